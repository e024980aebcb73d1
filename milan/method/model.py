"""Masked pretraining as the paper states it: sample, encode, decode, loss."""

from pathlib import Path

import torch
from torch import Tensor, nn

from milan.method import masking
from milan.method.decoder import DECODERS
from milan.method.encoder import Encoder, patchify
from milan.params import AblationRow, Model
from milan.training.weights import load_into


class MaskedPretraining(nn.Module):
    """MILAN and its ablations: which target, which decoder and which masking is data (an AblationRow)."""

    def __init__(self, model: Model, recipe: AblationRow, mask_ratio: float, feature_dim: int | None):
        """feature_dim: width of the teacher's features; None for pixel targets."""
        super().__init__()
        self.recipe, self.patch_size, self.n_patches = recipe, model.patch_size, model.n_patches
        self.n_visible = masking.n_visible(model.n_patches, mask_ratio)
        out_dim = feature_dim if recipe.target == "clip" else 3 * model.patch_size**2
        tower = model.decoder
        self.encoder = Encoder(model)
        self.decoder = DECODERS[recipe.decoder](
            model.encoder.embed_dim, tower.embed_dim, tower.depth, tower.num_heads, model.grid, out_dim
        )

    def forward(self, images: Tensor, noise: Tensor, features: Tensor | None = None, importance: Tensor | None = None) -> Tensor:
        """images (B, 3, H, W) normalised; noise (B, N) Gumbel; features (B, 1+N, D) and importance (B, N) of the
        teacher where the recipe asks for them -> the loss, a scalar."""
        visible = masking.sample_visible(noise, self.n_visible, importance if self.recipe.masking == "semantic" else None)
        masked = masking.complement(visible, self.n_patches)
        predictions = self.predict(images, visible, masked)
        if self.recipe.target == "clip":
            return feature_loss(predictions, in_decoder_order(features, visible, masked)).mean()
        return pixel_loss(predictions[:, 1 + self.n_visible :], self.pixel_targets(images, masked)).mean()

    def predict(self, images: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        """(B, 1+N, D) in decoder order: class token, visible, masked."""
        return self.decoder(self.encoder(images, visible), visible, masked)

    def pixel_targets(self, images: Tensor, masked: Tensor) -> Tensor:
        """(B, N-K, 3 p p) masked patches, each normalised by its own mean and unbiased variance (MAE, norm_pix)."""
        patches = masking.gather(patchify(images, self.patch_size), masked)
        mean, variance = patches.mean(dim=-1, keepdim=True), patches.var(dim=-1, keepdim=True)
        return (patches - mean) / (variance + 1e-6).sqrt()


def load_pretrained(folder: Path, model: Model, recipe: AblationRow, mask_ratio: float, feature_dim: int) -> MaskedPretraining:
    """Encoder and decoder as the pretrain stage left them in its folder."""
    found = MaskedPretraining(model, recipe, mask_ratio, feature_dim)
    load_into(found.encoder.vit, folder / "encoder.safetensors")
    load_into(found.decoder, folder / "decoder.safetensors")
    return found


def feature_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """(B, T, D) twice -> (B, T): 2 - 2 cos, the squared distance of unit vectors (models_milan.py, forward_loss); every token
    counts, class token and visible ones included; float32 whatever the autocast."""
    predictions, targets = predictions.float(), targets.float()
    predictions = predictions / predictions.norm(dim=-1, keepdim=True)
    targets = targets / targets.norm(dim=-1, keepdim=True)
    return 2 - 2 * (predictions * targets).sum(dim=-1)


def pixel_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """(B, M, P) twice -> (B, M): mean squared error a patch; masked patches only."""
    return (predictions.float() - targets).square().mean(dim=-1)


def in_decoder_order(tokens: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
    """(B, 1+N, D) in image order -> class token, visible, masked."""
    order = torch.cat([torch.zeros_like(visible[:, :1]), visible + 1, masked + 1], dim=1)
    return masking.gather(tokens, order)


def in_image_order(tokens: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
    """The inverse of in_decoder_order."""
    k = 1 + visible.shape[1]
    patches = masking.restore(tokens[:, 1:k], tokens[:, k:], visible, masked)
    return torch.cat([tokens[:, :1], patches], dim=1)
