"""Sliding-window inference: segment an image of any size with a model of a fixed window; the scores of a whole split."""

from collections.abc import Callable, Sequence

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
    """Return mIoU and accuracies in %: sliding-window inference, compared at each scene's own size.

    model: in eval mode, on the device. The ranks share the scenes, and each gets the scores of all."""
    classes = len(val.manifest["classes"])
    counts = torch.zeros(classes, classes, dtype=torch.int64)
    mine = range(distributed.rank(), len(val), distributed.world_size())
    for index in track(mine, "segmenting", len(mine)) if distributed.rank() == 0 else mine:
        image, labels = scenes.decode_scene(val[index], classes)
        with autocast(precision, device):
            predicted = predict(model, image[None].to(device), labels.shape, section, classes)[0]
        counts += miou.confusion(predicted.cpu(), labels, classes)
    scores = miou.scores(distributed.total(counts))
    return {name: value for name, value in scores.items() if name != "class_iou"}


def predict(model: Model, images: Tensor, size: Sequence[int], section: SceneTraining, classes: int) -> Tensor:
    """Return the predicted classes (n, *size) of images, uint8 (n, 3, H, W).

    With several of section.scales, or section.flip, the probabilities of all passes are averaged (mmsegmentation's
    multi-scale test of MAE, configs/mae: no scene's short side is made smaller than the window)."""
    passes = [(scale, mirrored) for scale in section.scales for mirrored in ((False, True) if section.flip else (False,))]
    maps = (resize_maps(scene_logits(model, images, section, classes, *one), size) for one in passes)
    if len(passes) == 1:
        return next(maps).argmax(dim=1)
    return sum(logits.softmax(dim=1) for logits in maps).argmax(dim=1)


def scene_logits(model: Model, images: Tensor, section: SceneTraining, classes: int, scale: float, mirrored: bool) -> Tensor:
    """Return logits (n, C, h, w) of images, uint8 (n, 3, H, W), resized to `scale` times the recipe's test scale; mirrored:
    computed from the mirrored images, and mirrored back."""
    smallest = min(1.0, section.crop_size / min(section.resize))  # the short side is then the window's
    resized, _ = scenes.resize_scene(images, None, section.resize, max(scale, smallest))
    inputs = transforms.normalise(resized.flip(-1) if mirrored else resized)
    logits = slide_logits(model, inputs, section.crop_size, section.stride, classes)
    return logits.flip(-1) if mirrored else logits


@torch.no_grad()
def slide_logits(
    model: Model,
    images: Tensor,
    window: int,
    stride: int,
    num_classes: int,
) -> Tensor:
    """Return logits (n, num_classes, H, W) float32 of whole images (n, 3, H, W), computed in square windows.

    model: returns logits (n, num_classes, h, w) and auxiliary ones; the caller puts it into eval mode. A window starts every
    `stride` pixels, the last one flush with the border, and overlapping logits are averaged (mmseg's slide mode). An image
    smaller than the window is padded with zeros (the mean colour) at its right and bottom.
    Raises ValueError when stride > window would leave gaps."""
    if not 0 < stride <= window:
        raise ValueError(f"stride {stride} leaves gaps between windows of {window} px")
    height, width = images.shape[2:]
    images = F.pad(images, (0, max(window - width, 0), 0, max(window - height, 0)))
    total = images.new_zeros(len(images), num_classes, *images.shape[2:], dtype=torch.float32)
    count = torch.zeros_like(total[:1, :1])
    for top in _window_starts(images.shape[2], window, stride):
        for left in _window_starts(images.shape[3], window, stride):
            area = (..., slice(top, top + window), slice(left, left + window))
            logits, _ = model(images[area])
            total[area] += resize_maps(logits.float(), (window, window))
            count[area] += 1
    return (total / count)[..., :height, :width]


def _window_starts(size: int, window: int, stride: int) -> list[int]:
    """Return where windows begin along one side: every stride, the last one flush with the end."""
    last = size - window
    return [min(start, last) for start in range(0, last + stride, stride)]
