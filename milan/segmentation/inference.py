"""Sliding-window inference: segment an image of any size with a model of a fixed window; the scores of a whole split."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from milan.core.progress import track
from milan.data import transforms
from milan.data.records import Records
from milan.params import SceneTraining
from milan.segmentation import miou, scenes
from milan.segmentation.upernet import resize_maps
from milan.training import distributed
from milan.training.device import autocast

Model = Callable[[Tensor], tuple[Tensor, Tensor | None]]  # images (B, 3, S, S) -> logits (B, C, h, w), auxiliary ones or None


def assess(model: Model, val: Records, section: SceneTraining, precision: str, device: torch.device) -> dict[str, float]:
    """Return mIoU and accuracies in %: sliding-window inference at the recipe's scale, compared at each scene's own size.

    model: in eval mode, on the device. The ranks share the scenes, and each gets the scores of all."""
    classes = len(val.manifest["classes"])
    counts = torch.zeros(classes, classes, dtype=torch.int64)
    mine = range(distributed.rank(), len(val), distributed.world_size())
    for index in track(mine, "segmenting", len(mine)) if distributed.rank() == 0 else mine:
        image, labels = scenes.decode_scene(val[index], classes)
        with autocast(precision, device):
            logits = scene_logits(model, image.to(device), section, classes)
        predicted = resize_maps(logits, labels.shape).argmax(dim=1)[0]
        counts += miou.confusion(predicted.cpu(), labels, classes)
    scores = miou.scores(distributed.total(counts))
    return {name: value for name, value in scores.items() if name != "class_iou"}


def scene_logits(model: Model, image: Tensor, section: SceneTraining, classes: int) -> Tensor:
    """Return logits (1, C, h, w) of an image, uint8 (3, H, W), at the recipe's test scale."""
    resized, _ = scenes.resize_scene(image, None, section.resize, 1.0)
    return slide_logits(model, transforms.normalise(resized.unsqueeze(0)), section.crop_size, section.stride, classes)


@torch.no_grad()
def slide_logits(
    model: Model,
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
