"""Augment labelled training images: the linear probe's crop, RandAugment and random erasing."""

import math

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from milan.data.transforms import IMAGENET


def draw_simple_crop(height: int, width: int, scale: list[float], generator: torch.Generator) -> tuple[int, int, int, int, bool]:
    """Draw the linear probe's crop of a height x width image: (top, left, height, width, flip), in pixels.

    Unlike transforms.draw_crop it draws area and ratio once and cuts the sides to the image's
    (util/crop.py of MAE and MILAN, after BYOL). scale: smallest and largest share of the image's area."""
    area_draw, ratio_draw, top_draw, left_draw, flip_draw = torch.rand(5, generator=generator).tolist()
    area = height * width * (scale[0] + (scale[1] - scale[0]) * area_draw)
    ratio = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * ratio_draw)
    crop_width = max(1, min(round(math.sqrt(area * ratio)), width))
    crop_height = max(1, min(round(math.sqrt(area / ratio)), height))
    top, left = int(top_draw * (height - crop_height + 1)), int(left_draw * (width - crop_width + 1))
    return top, left, crop_height, crop_width, flip_draw < 0.5


class FinetuneAugment:
    """Apply timm's RandAugment to a cropped uint8 image (3, S, S); rand_augment: timm's specification, None for none."""

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
    """Replace a rectangle of each image by per-pixel noise, with this probability; images (B, 3, H, W) are normalised."""
    from timm.data.random_erasing import RandomErasing

    return RandomErasing(probability, mode="pixel", max_count=1, num_splits=0, device=images.device)(images)
