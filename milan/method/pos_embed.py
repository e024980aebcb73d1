"""Absolute position embeddings of a plain ViT: the fixed sin-cos table, and interpolation to another grid.

Both use timm's layout (1, 1 + N, D): one row for the class token, then the N patches of a square grid, row by row.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def sincos_pos_embed(dim: int, grid: int) -> Tensor:
    """Return the fixed 2-D table of MAE and MILAN, (1, 1 + grid * grid, dim) float32.

    The first half of the channels encodes the column, the second half the row; within each half sines come before cosines.
    The row of the class token is zero. mmpretrain's table has the halves swapped, so converting a checkpoint must keep its
    table. Raises ValueError when dim is no multiple of 4."""
    if dim % 4:
        raise ValueError(f"a sin-cos table needs a width divisible by 4, not {dim}")
    quarter = dim // 4
    # In float64: the angles reach the grid's size, and float32 would lose digits of their sines.
    frequencies = 1 / 10000 ** (np.arange(quarter, dtype=np.float64) / quarter)
    angles = np.outer(np.arange(grid, dtype=np.float64), frequencies)
    line = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # (grid, dim / 2)
    columns, rows = np.tile(line, (grid, 1)), np.repeat(line, grid, axis=0)
    table = np.concatenate([columns, rows], axis=1)
    table = np.concatenate([np.zeros((1, dim)), table])
    return torch.from_numpy(table.astype(np.float32))[None]


def interpolate_pos_embed(pos_embed: Tensor, grid: int) -> Tensor:
    """Interpolate a position embedding (1, 1 + N, D) to another square grid: (1, 1 + grid * grid, D).

    Bicubic, corners not aligned, no antialiasing, as in MAE's fine-tuning; the row of the class token is kept. Raises
    ValueError for another shape or when N is no square."""
    if pos_embed.ndim != 3 or len(pos_embed) != 1 or pos_embed.shape[1] < 2:
        raise ValueError(f"pos_embed should be (1, 1 + N, D), not {tuple(pos_embed.shape)}")
    class_row, patches = pos_embed[:, :1], pos_embed[:, 1:]
    old_grid = math.isqrt(patches.shape[1])
    if old_grid * old_grid != patches.shape[1]:
        raise ValueError(f"pos_embed has {patches.shape[1]} patch rows, which is no square grid")
    if old_grid == grid:
        return pos_embed
    image = patches.unflatten(1, (old_grid, old_grid)).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([class_row, image.flatten(2).transpose(1, 2)], dim=1)
