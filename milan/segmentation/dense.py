"""The frozen dense probe: batch norm and one linear layer on the patch features of a frozen encoder's last block.

The head and the setting "linear" of DINOv2 (arXiv 2304.07193, section 7.4; BNHead of dinov2/eval/segmentation): patch
tokens after the final norm, without the class token; logits on the patches' grid, upsampled bilinearly to the pixels.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from milan.method.encoder import Encoder
from milan.method.pos_embed import interpolate_pos_embed
from milan.params import Model
from milan.segmentation.upernet import NORMS, classifier
from milan.training.device import autocast
from milan.training.weights import OTHER_MODEL, load_state, load_weights


class DenseHead(nn.Module):
    """Batch norm (affine, eps 1e-5) and a linear layer on every patch (weights N(0, 0.01), bias 0).

    norm: "sync" computes the statistics over the processes of a GPU run, "batch" over one process."""

    def __init__(self, dim: int, classes: int, norm: str):
        super().__init__()
        self.norm = NORMS[norm](dim)
        self.linear = classifier(dim, classes)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (B, classes, G, G) of features (B, D, G, G)."""
        return self.linear(self.norm(features))


def frozen_encoder(path: Path, model: Model, crop_size: int, precision: str, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return a function from normalised crops (B, 3, S, S) to patch features (B, D, G, G), G = S / patch_size, without gradient.

    path: the encoder that the pretrain stage wrote; its position embedding is interpolated to the crop's grid. Raises UserError
    when it does not have the recipe's sizes."""
    of_crop = dataclasses.replace(model, image_size=crop_size)
    encoder, state = Encoder(of_crop), load_weights(path)
    if "pos_embed" in state:
        state["pos_embed"] = interpolate_pos_embed(state["pos_embed"], of_crop.grid)
    load_state(encoder.vit, state, path, OTHER_MODEL)
    encoder.to(device).eval()

    @torch.no_grad()
    def encode(images: Tensor) -> Tensor:
        with autocast(precision, device):
            patches = encoder(images)[:, 1:].float()
        return patches.transpose(1, 2).unflatten(2, (of_crop.grid, of_crop.grid))

    return encode
