"""Every image transform of every stage. Images are uint8 tensors (3, H, W) until `normalise`.

Geometry runs on uint8 tensors (torchvision v2, antialiased bicubic: equal to PIL's to a grey level or two);
normalisation runs on the device, a batch at a time. Randomness comes from the global torch generator,
which the data set points at (seed, purpose, epoch, index) before each call (see rng.seed_globals).
"""

import contextlib
import math
import random

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from milan.errors import UserError
from milan.images import open_image, rgb

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
NORMALISATIONS = {"imagenet": IMAGENET, "clip": CLIP}
JPEG = b"\xff\xd8\xff"  # what such a file begins with
BICUBIC = v2.InterpolationMode.BICUBIC


def decode(data: bytes, name: str = "image") -> Tensor:
    """Encoded bytes -> uint8 (3, H, W) RGB; orientation tags are ignored, as the reference's PIL loader does.

    Raises UserError naming the image when it cannot be read. torchvision's decoder is the fast one, and is given JPEG alone:
    a damaged PNG ends its process."""
    if data.startswith(JPEG):
        with contextlib.suppress(RuntimeError):  # what it refuses, such as some colour spaces, PIL may take
            return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    try:
        with open_image(data) as image:
            return F.pil_to_tensor(rgb(image))
    except Exception as error:  # PIL raises many kinds for broken files
        raise UserError(f"{name} is no readable image ({error}). Replace or remove it and prepare again.") from None


def normalise(images: Tensor, name: str = "imagenet") -> Tensor:
    """uint8 (B, 3, H, W) -> float32, (x / 255 - mean) / std."""
    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in NORMALISATIONS[name])
    # In place: on a CPU each new float copy of a batch costs as much as the arithmetic.
    return images.to(torch.float32, copy=True).div_(255).sub_(mean).div_(std)


def resize(images: Tensor, size: int) -> Tensor:
    """uint8 (..., 3, H, W) -> (..., 3, size, size), bicubic and antialiased; of that size already, untouched."""
    if images.shape[-2:] == (size, size):
        return images
    return F.resize(images, [size, size], interpolation=BICUBIC, antialias=True)


def renormalise(images: Tensor, source: str, target: str) -> Tensor:
    """Normalised one way -> normalised another way, without going back to bytes."""
    if source == target:
        return images
    (m0, s0), (m1, s1) = (
        [torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in NORMALISATIONS[n]] for n in (source, target)
    )
    return (images * s0 + m0 - m1) / s1


def draw_crop(height: int, width: int, scale: list[float], generator: torch.Generator) -> tuple[int, int, int, int, bool]:
    """(top, left, height, width, flip): torchvision's RandomResizedCrop.get_params (10 tries, log-uniform
    ratio in [3/4, 4/3], then the largest central crop) and a flip with probability 1/2, from our generator."""

    draws = iter(torch.rand(23, generator=generator).tolist())  # as many as ten tries and a place need

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * next(draws)

    flip = uniform(0, 1) < 0.5
    low, high = math.log(3 / 4), math.log(4 / 3)
    for _ in range(10):
        area = height * width * uniform(*scale)
        ratio = math.exp(uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = (int(uniform(0, 1) * (room + 1)) for room in (height - h, width - w))
            return min(top, height - h), min(left, width - w), h, w, flip
    h = min(height, round(width / (3 / 4))) if width / height < 3 / 4 else height
    w = min(width, round(height * (4 / 3))) if width / height > 4 / 3 else width
    return (height - h) // 2, (width - w) // 2, h, w, flip


def crop(image: Tensor, box: tuple[int, int, int, int, bool], size: int) -> Tensor:
    """Cut `box` out of uint8 (3, H, W), resize to (3, size, size) bicubic, flip when it says so."""
    top, left, height, width, flip = box
    cut = image[:, top : top + height, left : left + width].unsqueeze(0)
    if cut.shape[2:] != (height, width) or not cut.numel():
        raise UserError(f"The box {tuple(box)} leaves its image, {tuple(image.shape[1:])}: the target bank is of other images.")
    # The kernel behind v2's resized_crop, whose dispatch costs a fifth of it.
    cut = interpolate(cut, (size, size), mode="bicubic", antialias=True).squeeze(0)
    return cut.flip(-1) if flip else cut


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


def centre(image: Tensor, resize: int, size: int) -> Tensor:
    """Short side to `resize` (bicubic), then the central (size, size): the evaluation transform of every stage."""
    if min(image.shape[-2:]) != resize:
        image = F.resize(image, [resize], interpolation=BICUBIC, antialias=True)
    return F.center_crop(image, [size, size])


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


def decode_annotation(data: bytes, name: str = "annotation") -> Tensor:
    """Encoded one-channel label image -> uint8 (H, W), values as stored."""
    try:
        with open_image(data) as image:
            if image.mode not in ("L", "P"):
                raise ValueError(f"mode {image.mode}, expected one 8-bit channel")
            return F.pil_to_tensor(image).squeeze(0)
    except Exception as error:  # PIL raises many kinds for broken files
        raise UserError(f"{name}: its annotation is no readable label image ({error}).") from None
