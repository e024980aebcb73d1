"""Segmentation samples: scenes with labels, and the augmentation of mmsegmentation's ADE20K pipeline."""

import random

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from milan.data import seeding, transforms
from milan.data.records import Records
from milan.params import SceneTraining
from milan.segmentation.miou import reduce_zero_label


class SceneSamples(Dataset):
    """Augmented scenes: item (epoch, index) is {"image": uint8 (3, C, C), "label": uint8 (C, C)}, where C is crop_size."""

    def __init__(self, records: Records, seed: int, section: SceneTraining):
        self.records, self.seed, self.classes = records, seed, len(records.manifest["classes"])
        self.crop = {
            "crop_size": section.crop_size,
            "resize": section.resize,
            "ratio": section.resize_ratio,
            "max_share": section.max_class_share,
            "photometric": section.photometric,
        }

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        image, labels = decode_scene(self.records[index], self.classes)
        seeding.seed_globals(self.seed, "scene", epoch, index)
        image, labels = scene_crop(image, labels, **self.crop)
        return {"image": image, "label": labels}


def decode_scene(record: dict, classes: int) -> tuple[Tensor, Tensor]:
    """Decode a scene record into an image, uint8 (3, H, W), and labels, uint8 (H, W): 0..classes - 1, 255 ignored."""
    image = transforms.decode(record["image"], record["name"])
    return image, reduce_zero_label(transforms.decode_annotation(record["mask"], record["name"]), classes)


def scene_crop(
    image: Tensor, labels: Tensor, *, crop_size: int, resize: list[int], ratio: list[float], max_share: float, photometric: bool
) -> tuple[Tensor, Tensor]:
    """Scale, crop, flip and recolour a scene at random (mmsegmentation's ADE20K pipeline), with the global generator.

    image: uint8 (3, H, W); labels: uint8 (H, W), 255 ignored; resize: (long, short) sides in pixels before the random
    scale, drawn from `ratio`. The crop is drawn up to 10 times, until no class fills more than `max_share` of its labelled
    pixels. Smaller scenes are padded, images with 0 and labels with 255."""
    image, labels = resize_scene(image, labels, resize, random.uniform(*ratio))
    for _ in range(10):
        top, left = (random.randint(0, max(side - crop_size, 0)) for side in labels.shape)
        counts = labels[top : top + crop_size, left : left + crop_size].flatten().bincount(minlength=256)[:255]
        if (counts > 0).sum() > 1 and counts.max() < max_share * counts.sum():
            break
    image, labels = (array[..., top : top + crop_size, left : left + crop_size] for array in (image, labels))
    if random.random() < 0.5:
        image, labels = image.flip(-1), labels.flip(-1)
    if photometric:
        image = photometric_distortion(image)
    pad = [0, 0, crop_size - labels.shape[1], crop_size - labels.shape[0]]
    return F.pad(image, pad, fill=0), F.pad(labels.unsqueeze(0), pad, fill=255).squeeze(0)


def resize_scene(image: Tensor, labels: Tensor | None, resize: list[int], ratio: float) -> tuple[Tensor, Tensor | None]:
    """Fit an image (..., 3, H, W) and its labels (H, W) into (long, short) = resize * ratio, keeping the aspect.

    The rounding is that of mmcv's rescale_size."""
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
    """Change brightness by up to 32/255, contrast and saturation by 0.5 to 1.5, hue by up to 18 degrees.

    Each change is made with probability 1/2; contrast comes second or last (mmsegmentation's PhotoMetricDistortion)."""
    if random.random() < 0.5:
        image = (image.float() + random.uniform(-32, 32)).clamp(0, 255).to(torch.uint8)
    contrast_last = random.random() < 0.5
    if not contrast_last:
        image = random_contrast(image)
    if random.random() < 0.5:
        image = F.adjust_saturation(image, random.uniform(0.5, 1.5))
    if random.random() < 0.5:
        image = F.adjust_hue(image, random.uniform(-18, 18) / 360)
    return random_contrast(image) if contrast_last else image


def random_contrast(image: Tensor) -> Tensor:
    """Scale the pixel values by 0.5 to 1.5 with probability 1/2."""
    if random.random() < 0.5:
        return (image.float() * random.uniform(0.5, 1.5)).clamp(0, 255).to(torch.uint8)
    return image
