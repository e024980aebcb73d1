"""Choose the patches that stay visible. Pure functions on patch indices; shapes: B images, N patches, K visible ones.

The paper's semantic aware sampling (models_milan.py, attn_mask) keeps patch j with a probability that grows with the
teacher's class-token attention to it. The release draws torch.multinomial(importance, N) without replacement. The same
distribution is a Gumbel top-k on log importance (Efraimidis & Spirakis 2006; Kool et al. 2019), which takes its noise as an
argument and does not fail on zero probabilities.
"""

import torch
from torch import Tensor

from milan.data import seeding


def n_visible(n_patches: int, mask_ratio: float) -> int:
    """Return the number of visible patches: int(N (1 - ratio)), truncated in floating point as in the release, which gives
    9, not 10, of 100 patches at ratio 0.9."""
    return int(n_patches * (1 - mask_ratio))


def gumbel(seed: int, epoch: int, index: int, n_patches: int, purpose: str = "mask") -> Tensor:
    """Draw the standard Gumbel noise of one sample in one epoch: (N,) float32."""
    uniform = torch.rand(n_patches, generator=seeding.generator(seed, purpose, epoch, index), dtype=torch.float64)
    return -torch.log(-torch.log(uniform.clamp(1e-300, 1 - 1e-16))).float()


def sample_visible(noise: Tensor, count: int, importance: Tensor | None = None) -> Tensor:
    """Draw `count` visible patches of each image: (B, K) int64 indices, in the order of the draw.

    noise: (B, N) Gumbel. importance: (B, N) >= 0 on any scale; None draws uniformly (random masking). Patches of zero
    importance are taken only when all others are, in random order."""
    if importance is not None:
        # float64 ranks importance below float32's normal numbers correctly. The clamp puts zeros behind every positive
        # patch (the logarithms of those end at -745, the noise at +-40), and the noise still orders the zeros.
        noise = noise + importance.double().log().clamp_min(-1e3)
    return noise.argsort(dim=1, descending=True)[:, :count]


def all_patches(n_images: int, n_patches: int) -> Tensor:
    """Return the indices that keep every patch visible: (n_images, N) int64."""
    return torch.arange(n_patches).expand(n_images, -1)


def complement(visible: Tensor, n_patches: int) -> Tensor:
    """Return the masked patches of visible (B, K): (B, N-K) int64 indices, ascending."""
    mask = mask_of(visible, n_patches)
    return mask.argsort(dim=1, descending=True, stable=True)[:, : n_patches - visible.shape[1]]


def mask_of(visible: Tensor, n_patches: int) -> Tensor:
    """Return the mask of visible (B, K): (B, N) float32, 0 = keep (visible), 1 = remove (masked)."""
    mask = torch.ones(visible.shape[0], n_patches, device=visible.device)
    return mask.scatter(1, visible, 0.0)


def gather(tokens: Tensor, indices: Tensor) -> Tensor:
    """Select tokens (B, N, D) at indices (B, K): (B, K, D)."""
    return tokens.gather(1, indices.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
