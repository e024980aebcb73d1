"""Which patches stay visible: pure functions on indices. Shapes: B images, N patches, K kept.

The paper's "semantic aware" sampling (models_milan.py, attn_mask) keeps patch j with a probability that grows with the
teacher's class-token attention to it. The release draws torch.multinomial(importance, N) without
replacement; the same distribution is a Gumbel top-k on log importance (Efraimidis & Spirakis 2006;
Kool et al. 2019), which takes its noise as an argument and does not fail on zero probabilities.
"""

import torch
from torch import Tensor

from milan.data import seeding


def n_visible(n_patches: int, mask_ratio: float) -> int:
    """Patches kept: int(N (1 - ratio)), truncated in floating point as in the release (a quirk that
    gives 9, not 10, of 100 at ratio 0.9)."""
    return int(n_patches * (1 - mask_ratio))


def gumbel(seed: int, epoch: int, index: int, n_patches: int, purpose: str = "mask") -> Tensor:
    """(N,) float32 standard Gumbel noise of one sample in one epoch."""
    uniform = torch.rand(n_patches, generator=seeding.generator(seed, purpose, epoch, index), dtype=torch.float64)
    return -torch.log(-torch.log(uniform.clamp(1e-300, 1 - 1e-16))).float()


def sample_visible(noise: Tensor, k: int, importance: Tensor | None = None) -> Tensor:
    """(B, K) int64 indices of the visible patches, in the order of the draw.

    noise (B, N) Gumbel; importance (B, N) >= 0, any scale; None means uniform (random masking).
    Patches of zero importance are taken only when the others are used up, in random order.
    """
    if importance is not None:
        # In float64, so that what is below float32's normal numbers still has its rank. Zeros come behind every
        # positive patch (whose logarithms end at -745, and noise at +-40) yet stay ordered by noise.
        noise = noise + importance.double().log().clamp_min(-1e3)
    return noise.argsort(dim=1, descending=True)[:, :k]


def whole(n: int, n_patches: int) -> Tensor:
    """(n, N) int64: every patch of n images is visible."""
    return torch.arange(n_patches).expand(n, -1)


def complement(visible: Tensor, n_patches: int) -> Tensor:
    """(B, N - K) int64 indices of the masked patches, ascending."""
    mask = mask_of(visible, n_patches)
    return mask.argsort(dim=1, descending=True, stable=True)[:, : n_patches - visible.shape[1]]


def mask_of(visible: Tensor, n_patches: int) -> Tensor:
    """(B, N) float32 mask: 0 is keep (visible), 1 is remove (masked)."""
    mask = torch.ones(visible.shape[0], n_patches, device=visible.device)
    return mask.scatter(1, visible, 0.0)


def gather(tokens: Tensor, indices: Tensor) -> Tensor:
    """tokens (B, N, D) at indices (B, K) -> (B, K, D)."""
    return tokens.gather(1, indices.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def restore(visible_tokens: Tensor, masked_tokens: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
    """Image order again: (B, K, D) at `visible` and (B, N-K, D) at `masked` -> (B, N, D)."""
    inverse = torch.cat([visible, masked], dim=1).argsort(dim=1)
    return gather(torch.cat([visible_tokens, masked_tokens], dim=1), inverse)
