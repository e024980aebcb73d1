"""Every image transform of every stage. Images are uint8 tensors (3, H, W) until `normalise`.

Geometry runs on uint8 tensors (torchvision v2, antialiased bicubic: equal to PIL's to a grey level or two);
normalisation runs on the device, a batch at a time. Randomness comes from the global torch generator,
which the data set points at (seed, purpose, epoch, index) before each call (see rng.seed_globals).
"""

import contextlib
import math

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from milan.core.errors import UserError
from milan.data.images import open_image, rgb

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


def centre(image: Tensor, resize: int, size: int) -> Tensor:
    """Short side to `resize` (bicubic), then the central (size, size): the evaluation transform of every stage."""
    if min(image.shape[-2:]) != resize:
        image = F.resize(image, [resize], interpolation=BICUBIC, antialias=True)
    return F.center_crop(image, [size, size])


def decode_annotation(data: bytes, name: str = "annotation") -> Tensor:
    """Encoded one-channel label image -> uint8 (H, W), values as stored."""
    try:
        with open_image(data) as image:
            if image.mode not in ("L", "P"):
                raise ValueError(f"mode {image.mode}, expected one 8-bit channel")
            return F.pil_to_tensor(image).squeeze(0)
    except Exception as error:  # PIL raises many kinds for broken files
        raise UserError(f"{name}: its annotation is no readable label image ({error}).") from None
