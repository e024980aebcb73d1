"""Sliding-window inference: segment an image of any size with a model of a fixed window."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from milan.segmentation.upernet import resize_maps


@torch.no_grad()
def slide_logits(
    model: Callable[[Tensor], tuple[Tensor, Tensor]],
    image: Tensor,
    window: int,
    stride: int,
    num_classes: int,
) -> Tensor:
    """Return logits (1, num_classes, H, W) float32 of a whole image (1, 3, H, W), computed in square windows.

    model: returns logits (1, num_classes, h, w) and auxiliary ones; the caller puts it into eval mode. A window starts every
    `stride` pixels, the last one flush with the border, and overlapping logits are averaged (mmseg's slide mode). An image
    smaller than the window is padded with zeros (the mean colour) at its right and bottom.
    Raises ValueError when stride > window would leave gaps."""
    if not 0 < stride <= window:
        raise ValueError(f"stride {stride} leaves gaps between windows of {window} px")
    height, width = image.shape[2:]
    image = F.pad(image, (0, max(window - width, 0), 0, max(window - height, 0)))
    total = image.new_zeros(1, num_classes, *image.shape[2:], dtype=torch.float32)
    count = torch.zeros_like(total[:, :1])
    for top in _window_starts(image.shape[2], window, stride):
        for left in _window_starts(image.shape[3], window, stride):
            area = (..., slice(top, top + window), slice(left, left + window))
            logits, _ = model(image[area])
            total[area] += resize_maps(logits.float(), (window, window))
            count[area] += 1
    return (total / count)[..., :height, :width]


def _window_starts(size: int, window: int, stride: int) -> list[int]:
    """Return where windows begin along one side: every stride, the last one flush with the end."""
    last = size - window
    return [min(start, last) for start in range(0, last + stride, stride)]
