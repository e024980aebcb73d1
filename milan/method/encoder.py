"""The student encoder: timm's VisionTransformer, run on the visible patches only."""

from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from milan.data.patches import embed_patches, patchify
from milan.method import masking
from milan.method.pos_embed import sincos_pos_embed
from milan.params import Model
from milan.training.weights import load_into


def build_vit(model: Model, **options) -> VisionTransformer:
    """Build timm's ViT of the recipe's size, with names, shapes and epsilon (LayerNorm 1e-6) of the published checkpoints.

    options: passed to timm over the defaults here."""
    grid = {"img_size": model.image_size, "patch_size": model.patch_size}
    size = {"embed_dim": model.encoder.embed_dim, "depth": model.encoder.depth, "num_heads": model.encoder.num_heads}
    return VisionTransformer(**grid, **size, **{"num_classes": 0, "global_pool": "token", **options})


class Encoder(nn.Module):
    """A ViT over the visible patches, with a fixed sin-cos position embedding (models_milan.py, after MAE)."""

    def __init__(self, model: Model):
        super().__init__()
        self.vit, self.patch_size = build_vit(model), model.patch_size
        self.vit.pos_embed.requires_grad_(False)
        initialise_encoder(self.vit, model.grid)

    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tensor:
        """Encode images: (B, 1+K, D) after the final norm, class token first, then the patches in the order of `visible`.

        images: (B, 3, H, W) normalised. visible: (B, K) patch indices; None encodes all N patches in image order."""
        vit = self.vit
        patches = patchify(images, self.patch_size)
        positions = vit.pos_embed[:, 1:].expand(len(images), -1, -1)
        if visible is not None:
            patches, positions = masking.gather(patches, visible), masking.gather(positions, visible)
        class_token = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(images), -1, -1)
        return vit.norm(vit.blocks(torch.cat([class_token, self.embed(patches) + positions], dim=1)))

    def embed(self, patches: Tensor) -> Tensor:
        """Embed patches, (B, K, p p 3) -> (B, K, D): timm's convolution as a matrix product, so that masked patches cost
        nothing."""
        return embed_patches(patches, self.vit.patch_embed.proj)


def load_encoder(path: Path, model: Model) -> Encoder:
    """Load the encoder that the pretrain stage wrote. Raises UserError when it does not have the recipe's sizes."""
    encoder = Encoder(model)
    load_into(encoder.vit, path)
    return encoder


def initialise_encoder(vit: VisionTransformer, grid: int) -> None:
    """Initialise as MAE does: Xavier-uniform linears (the patch embedding counts as one), class token from a normal
    distribution with standard deviation 0.02, sin-cos positions."""
    initialise_linears(vit)
    nn.init.xavier_uniform_(vit.patch_embed.proj.weight.view(vit.embed_dim, -1))
    nn.init.normal_(vit.cls_token, std=0.02)
    with torch.no_grad():
        vit.pos_embed.copy_(sincos_pos_embed(vit.embed_dim, grid))


def initialise_linears(module: nn.Module) -> None:
    """Set the weights of all linear layers to Xavier-uniform draws and their biases to zero."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.xavier_uniform_(child.weight)
            nn.init.zeros_(child.bias)
