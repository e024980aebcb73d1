"""The student encoder: timm's VisionTransformer, run on the visible patches only."""

from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from milan import masking
from milan.checkpoint import load_into
from milan.params import Model
from milan.pos_embed import sincos_pos_embed


def build_vit(model: Model, **options) -> VisionTransformer:
    """timm's ViT of the recipe's size: names, shapes and epsilon of the published checkpoints (LayerNorm 1e-6)."""
    size = {"img_size": model.image_size, "patch_size": model.patch_size}
    tower = {"embed_dim": model.encoder.embed_dim, "depth": model.encoder.depth, "num_heads": model.encoder.num_heads}
    return VisionTransformer(**size, **tower, **{"num_classes": 0, "global_pool": "token", **options})


class Patches(nn.Conv2d):
    """A convolution whose windows neither overlap nor leave gaps, as the matrix product that it is: convolutions of three
    channels have slow kernels on GPUs. Takes the class of one that is there, whose names and weights stay."""

    def forward(self, images: Tensor) -> Tensor:
        side = self.kernel_size[0]
        tokens = nn.functional.linear(patchify(images, side), as_matrix(self), self.bias)
        return tokens.transpose(1, 2).unflatten(2, (images.shape[2] // side, images.shape[3] // side))


def as_matrix(proj: nn.Conv2d) -> Tensor:
    """(D, p p 3): the weights, in the order of patchify."""
    return proj.weight.permute(0, 2, 3, 1).flatten(1)


class Encoder(nn.Module):
    """ViT over visible patches, with a fixed sin-cos position embedding (models_milan.py, after MAE)."""

    def __init__(self, model: Model):
        super().__init__()
        self.vit, self.patch_size = build_vit(model), model.patch_size
        self.vit.pos_embed.requires_grad_(False)
        initialise_encoder(self.vit, model.grid)

    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tensor:
        """images (B, 3, H, W) normalised; visible (B, K) indices or None for all -> (B, 1+K, D), class token
        first, then the visible patches in the order of `visible`, after the final norm."""
        vit = self.vit
        patches, positions = patchify(images, self.patch_size), vit.pos_embed[:, 1:].expand(len(images), -1, -1)
        if visible is not None:
            patches, positions = masking.gather(patches, visible), masking.gather(positions, visible)
        cls = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(images), -1, -1)
        return vit.norm(vit.blocks(torch.cat([cls, self.embed(patches) + positions], dim=1)))

    def embed(self, patches: Tensor) -> Tensor:
        """(B, K, p p 3) -> (B, K, D): timm's convolution as the matrix product that it is, so that what is masked costs
        nothing."""
        proj = self.vit.patch_embed.proj
        return nn.functional.linear(patches, as_matrix(proj), proj.bias)


def load_encoder(path: Path, model: Model) -> Encoder:
    """The encoder that the pretrain stage wrote, by the recipe's sizes. Raises UserError when it is of others."""
    encoder = Encoder(model)
    load_into(encoder.vit, path)
    return encoder


def initialise_encoder(vit: VisionTransformer, grid: int) -> None:
    """Xavier-uniform linears, and the patch embedding seen as one; N(0, 0.02) class token; sin-cos positions."""
    initialise_linears(vit)
    nn.init.xavier_uniform_(vit.patch_embed.proj.weight.view(vit.embed_dim, -1))
    nn.init.normal_(vit.cls_token, std=0.02)
    with torch.no_grad():
        vit.pos_embed.copy_(sincos_pos_embed(vit.embed_dim, grid))


def initialise_linears(module: nn.Module) -> None:
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.xavier_uniform_(child.weight)
            nn.init.zeros_(child.bias)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """(B, 3, H, W) -> (B, N, p p 3), pixels of a patch row by row, channels last (MAE's order)."""
    batch, channels, height, width = images.shape
    grid = images.reshape(batch, channels, height // patch_size, patch_size, width // patch_size, patch_size)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch_size**2 * channels)
