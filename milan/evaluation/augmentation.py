"""Augmentation of labelled training images: the linear probe's crop, RandAugment and random erasing."""

import math

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from milan.data.transforms import IMAGENET


def draw_simple_crop(height: int, width: int, scale: list[float], generator: torch.Generator) -> tuple[int, int, int, int, bool]:
    """As draw_crop, without the retries: height and width are cut to the image's (the linear probe's crop in
    MAE and MILAN, util/crop.py, after BYOL)."""
    area, log_ratio, top, left, flip = torch.rand(5, generator=generator).tolist()
    target = height * width * (scale[0] + (scale[1] - scale[0]) * area)
    ratio = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * log_ratio)
    w, h = (
        max(1, min(round(side), room)) for side, room in ((math.sqrt(target * ratio), width), (math.sqrt(target / ratio), height))
    )
    return int(top * (height - h + 1)), int(left * (width - w + 1)), h, w, flip < 0.5


class FinetuneAugment:
    """RandAugment (on the cropped uint8 image, timm's) before, and random erasing after normalisation."""

    def __init__(self, rand_augment: str | None, size: int):
        from timm.data.auto_augment import rand_augment_transform

        fill = tuple(min(255, round(255 * channel)) for channel in IMAGENET[0])
        options = {"translate_const": int(size * 0.45), "img_mean": fill, "interpolation": Image.BICUBIC}
        self.augment = rand_augment_transform(rand_augment, options) if rand_augment else None

    def __call__(self, image: Tensor) -> Tensor:
        if self.augment is None:
            return image
        return F.pil_to_tensor(self.augment(F.to_pil_image(image)))


def random_erasing(images: Tensor, probability: float) -> Tensor:
    """Normalised (B, 3, H, W): each image, with this probability, loses a rectangle to per-pixel noise."""
    from timm.data.random_erasing import RandomErasing

    return RandomErasing(probability, mode="pixel", max_count=1, num_splits=0, device=images.device)(images)
