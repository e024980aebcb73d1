"""Masked pretraining as the paper states it: sample the visible patches, encode them, decode all tokens, compute the loss."""

from pathlib import Path

import torch
from torch import Tensor, nn

from milan.data.patches import patchify
from milan.method import masking
from milan.method.decoder import DECODERS
from milan.method.encoder import Encoder
from milan.params import AblationRow, Model
from milan.training.weights import load_into

NEAR_ZERO = 0.01  # a loss below it means targets that are nearly the same everywhere: 2 - 2 cos of an angle of 6 degrees


class MaskedPretraining(nn.Module):
    """MILAN and its ablations. An AblationRow says which target, decoder and masking a model has.

    Shapes: B images, N patches of p x p pixels, K of them visible, D feature width."""

    def __init__(self, model: Model, row: AblationRow, mask_ratio: float, feature_dim: int | None):
        """feature_dim: width of the teacher's features; None for pixel targets."""
        super().__init__()
        self.row, self.patch_size, self.n_patches = row, model.patch_size, model.n_patches
        self.n_visible = masking.n_visible(model.n_patches, mask_ratio)
        size, out_dim = model.decoder, feature_dim if row.target == "clip" else 3 * model.patch_size**2
        self.encoder = Encoder(model)
        self.decoder = DECODERS[row.decoder](
            model.encoder.embed_dim, size.embed_dim, size.depth, size.num_heads, model.grid, out_dim
        )

    def forward(self, images: Tensor, noise: Tensor, features: Tensor | None = None, importance: Tensor | None = None) -> Tensor:
        """Return the loss, a scalar.

        images: (B, 3, H, W) normalised. noise: (B, N) Gumbel. features (B, 1+N, D) and importance (B, N) come from the
        teacher, where the ablation row uses them."""
        visible, masked = self.sample_mask(noise, importance)
        latent = self.encoder(images, visible)
        predictions = self.decoder(latent, visible, masked)
        if self.row.target == "clip":  # MILAN: the teacher's features of all tokens
            targets = in_decoder_order(features, visible, masked)
            return feature_loss(predictions, targets).mean()
        targets = self.pixel_targets(images, masked)  # MAE: the pixels of the masked patches
        return pixel_loss(predictions[:, 1 + self.n_visible :], targets).mean()

    def sample_mask(self, noise: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
        """Draw the indices of visible (B, K) and masked (B, N-K) patches, by importance where the row says semantic."""
        visible = masking.sample_visible(noise, self.n_visible, importance if self.row.masking == "semantic" else None)
        return visible, masking.complement(visible, self.n_patches)

    def predict(self, images: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        """Return the predictions (B, 1+N, D) for given indices, in decoder order: class token, visible, masked."""
        return self.decoder(self.encoder(images, visible), visible, masked)

    def pixel_targets(self, images: Tensor, masked: Tensor) -> Tensor:
        """Return the masked patches (B, N-K, p p 3), each normalised by its own mean and unbiased variance (MAE,
        norm_pix_loss)."""
        patches = masking.gather(patchify(images, self.patch_size), masked)
        mean, variance = patches.mean(dim=-1, keepdim=True), patches.var(dim=-1, keepdim=True)
        return (patches - mean) / (variance + 1e-6).sqrt()


def load_pretrained(folder: Path, model: Model, row: AblationRow, mask_ratio: float, feature_dim: int) -> MaskedPretraining:
    """Load encoder and decoder from the folder of the pretrain stage. Raises UserError where they do not fit the sizes."""
    pretrained = MaskedPretraining(model, row, mask_ratio, feature_dim)
    load_into(pretrained.encoder.vit, folder / "encoder.safetensors")
    load_into(pretrained.decoder, folder / "decoder.safetensors")
    return pretrained


def feature_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of each token, (B, T, D) twice -> (B, T): 2 - 2 cos, the squared distance of unit vectors
    (models_milan.py, forward_loss). It counts the class token and the visible tokens too; float32 under any autocast."""
    predictions, targets = predictions.float(), targets.float()
    predictions = predictions / predictions.norm(dim=-1, keepdim=True)
    targets = targets / targets.norm(dim=-1, keepdim=True)
    return 2 - 2 * (predictions * targets).sum(dim=-1)


def pixel_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """Return the mean squared error of each masked patch, (B, N-K, p p 3) twice -> (B, N-K)."""
    return (predictions.float() - targets).square().mean(dim=-1)


def in_decoder_order(tokens: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
    """Reorder tokens (B, 1+N, D) from image order to class token, visible, masked."""
    return masking.gather(tokens, decoder_order(visible, masked))


def in_image_order(tokens: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
    """Reorder tokens (B, 1+N, D) from class token, visible, masked to image order: the inverse of in_decoder_order."""
    return masking.gather(tokens, decoder_order(visible, masked).argsort(dim=1))


def decoder_order(visible: Tensor, masked: Tensor) -> Tensor:
    """Return the positions (B, 1+N) of class token, visible and masked patches among the tokens of an image."""
    return torch.cat([torch.zeros_like(visible[:, :1]), visible + 1, masked + 1], dim=1)
