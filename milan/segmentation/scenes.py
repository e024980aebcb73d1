"""Segmentation samples: scenes with their labels, and the training crop of mmsegmentation's ADE20K pipeline."""

import random

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from milan.data import seeding, transforms
from milan.data.records import Records
from milan.segmentation.miou import reduce_zero_label


class SceneSamples(Dataset):
    """One training view of one scene: item (epoch, index) -> {"image" uint8 (3, C, C), "label" uint8 (C, C)}."""

    def __init__(self, records: Records, seed: int, classes: int, **crop):
        """crop: the keyword arguments of scene_crop."""
        self.records, self.seed, self.classes, self.crop = records, seed, classes, crop

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        image, labels = scene(self.records[index], self.classes)
        seeding.seed_globals(self.seed, "scene", epoch, index)
        image, labels = scene_crop(image, labels, **self.crop)
        return {"image": image, "label": labels}


def scene(record: dict, classes: int) -> tuple[Tensor, Tensor]:
    """uint8 (3, H, W) image and uint8 (H, W) labels 0..classes-1, 255 ignored, of one scene record."""
    image = transforms.decode(record["image"], record["name"])
    return image, reduce_zero_label(transforms.decode_annotation(record["mask"], record["name"]), classes)


def scene_crop(
    image: Tensor, labels: Tensor, *, crop_size: int, resize: list[int], ratio: list[float], max_share: float, photometric: bool
):
    """Training view of a scene: random scale, random crop, flip, colour (mmsegmentation's ADE20K pipeline).

    image uint8 (3, H, W); labels uint8 (H, W), 255 ignored. The crop is drawn up to 10 times until no
    class fills more than `max_share` of its labelled pixels. Smaller scenes are padded (image 0, label 255)."""
    image, labels = resize_scene(image, labels, resize, random.uniform(*ratio))
    for _ in range(10):
        top, left = (random.randint(0, max(side - crop_size, 0)) for side in labels.shape)
        counts = labels[top : top + crop_size, left : left + crop_size].flatten().bincount(minlength=256)[:255]
        if (counts > 0).sum() > 1 and counts.max() < max_share * counts.sum():
            break
    image, labels = (t[..., top : top + crop_size, left : left + crop_size] for t in (image, labels))
    if random.random() < 0.5:
        image, labels = image.flip(-1), labels.flip(-1)
    if photometric:
        image = photometric_distortion(image)
    pad = [0, 0, crop_size - labels.shape[1], crop_size - labels.shape[0]]
    return F.pad(image, pad, fill=0), F.pad(labels.unsqueeze(0), pad, fill=255).squeeze(0)


def resize_scene(image: Tensor, labels: Tensor | None, resize: list[int], ratio: float):
    """Fit into (long, short) = resize * ratio, keeping the aspect (mmcv's rescale rule)."""
    long, short = sorted((round(side * ratio) for side in resize), reverse=True)
    height, width = image.shape[-2:]
    factor = min(long / max(height, width), short / min(height, width))
    size = [max(1, int(side * factor + 0.5)) for side in (height, width)]
    if size != [height, width]:
        image = F.resize(image, size, interpolation=v2.InterpolationMode.BILINEAR, antialias=False)
        if labels is not None:
            labels = F.resize(labels.unsqueeze(0), size, interpolation=v2.InterpolationMode.NEAREST_EXACT).squeeze(0)
    return image, labels


def photometric_distortion(image: Tensor) -> Tensor:
    """Brightness +-32/255, contrast and saturation 0.5-1.5, hue +-18 degrees, each half of the time."""
    if random.random() < 0.5:
        image = (image.float() + random.uniform(-32, 32)).clamp(0, 255).to(torch.uint8)
    contrast_last = random.random() < 0.5
    if not contrast_last:
        image = contrast(image)
    if random.random() < 0.5:
        image = F.adjust_saturation(image, random.uniform(0.5, 1.5))
    if random.random() < 0.5:
        image = F.adjust_hue(image, random.uniform(-18, 18) / 360)
    return contrast(image) if contrast_last else image


def contrast(image: Tensor) -> Tensor:
    if random.random() < 0.5:
        return (image.float() * random.uniform(0.5, 1.5)).clamp(0, 255).to(torch.uint8)
    return image
