"""Image transforms that several stages share: decode, crop, resize, normalise.

Images are uint8 tensors (3, H, W) until `normalise`. Geometry runs on uint8 (torchvision v2, antialiased bicubic: within two
grey levels of PIL's); normalisation runs on the device, a batch at a time. Crops are drawn from a generator that the data set
keys by (seed, purpose, epoch, index); see seeding.py.
"""

import contextlib
import functools
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
NORMALISATIONS = {"imagenet": IMAGENET, "clip": CLIP}  # (mean, standard deviation) of each channel
JPEG = b"\xff\xd8\xff"  # the first bytes of such a file
ASPECT = 32  # long side by short side of an image that is resized whole
BICUBIC = v2.InterpolationMode.BICUBIC


def decode(data: bytes, name: str = "image") -> Tensor:
    """Decode an image file: uint8 (3, H, W) RGB. Orientation tags are ignored, as in the reference's PIL loader.

    torchvision's fast decoder gets JPEG alone, because a damaged PNG ends its process. Raises UserError that names the image
    when it cannot be read."""
    if data.startswith(JPEG):
        with contextlib.suppress(RuntimeError):  # PIL may read what it refuses, such as some colour spaces
            return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    try:
        with open_image(data) as image:
            return F.pil_to_tensor(rgb(image))
    except Exception as error:  # PIL raises many kinds for broken files
        raise UserError(f"{name} is no readable image ({error}). Replace or remove it and prepare again.") from None


def normalise(images: Tensor, name: str = "imagenet") -> Tensor:
    """Normalise a batch, uint8 (B, 3, H, W) -> float32: (image / 255 - mean) / std. name: a key of NORMALISATIONS."""
    mean, std = statistics(name, images.device)
    # In place, because on a CPU each new float copy of a batch costs as much as the arithmetic.
    return images.to(torch.float32, copy=True).div_(255).sub_(mean).div_(std)


def resize(images: Tensor, size: int) -> Tensor:
    """Resize uint8 (..., 3, H, W) -> (..., 3, size, size), bicubic and antialiased. Images of that size return unchanged."""
    if images.shape[-2:] == (size, size):
        return images
    return F.resize(images, [size, size], interpolation=BICUBIC, antialias=True)


def renormalise(images: Tensor, source: str, target: str) -> Tensor:
    """Change the normalisation of float images (B, 3, H, W) from `source` to `target`, without a return to bytes."""
    if source == target:
        return images
    (source_mean, source_std), (target_mean, target_std) = (statistics(name, images.device) for name in (source, target))
    return (images * source_std + source_mean - target_mean) / target_std


@functools.cache
def statistics(name: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of a normalisation, each (1, 3, 1, 1) float32.

    They are made once: with each copy to a GPU the host would wait for the work it has queued there."""
    with torch.inference_mode(False):  # whoever asks first, also a training may use them
        mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in NORMALISATIONS[name])
    return mean, std


def draw_crop(height: int, width: int, scale: list[float], generator: torch.Generator) -> tuple[int, int, int, int, bool]:
    """Draw a crop: (top, left, height, width, flip), in pixels of an image of height x width.

    As torchvision's RandomResizedCrop.get_params: up to ten tries with the area uniform in scale (shares of the image) and
    the ratio log-uniform in [3/4, 4/3], then the largest central crop. flip is True with probability 1/2."""

    draws = iter(torch.rand(23, generator=generator).tolist())  # enough for the flip, ten tries and a position

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * next(draws)

    flip = uniform(0, 1) < 0.5
    low, high = math.log(3 / 4), math.log(4 / 3)
    for _ in range(10):
        area = height * width * uniform(*scale)
        ratio = math.exp(uniform(low, high))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top, left = (int(uniform(0, 1) * (room + 1)) for room in (height - crop_height, width - crop_width))
            return min(top, height - crop_height), min(left, width - crop_width), crop_height, crop_width, flip
    crop_height = min(height, round(width / (3 / 4))) if width / height < 3 / 4 else height
    crop_width = min(width, round(height * (4 / 3))) if width / height > 4 / 3 else width
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width, flip


def crop(image: Tensor, box: tuple[int, int, int, int, bool], size: int) -> Tensor:
    """Cut a box (top, left, height, width, flip) out of uint8 (3, H, W) and resize it, bicubic and antialiased: (3, size, size).

    Raises UserError when the box does not lie inside the image."""
    top, left, height, width, flip = box
    cut = image[:, top : top + height, left : left + width].unsqueeze(0)
    if cut.shape[2:] != (height, width) or not cut.numel():
        shape = tuple(image.shape[1:])
        raise UserError(f"The box {tuple(box)} leaves its image, {shape}: the target bank was made of other images.")
    # The kernel behind v2's resized_crop, without its dispatch, which costs a fifth more.
    cut = interpolate(cut, (size, size), mode="bicubic", antialias=True).squeeze(0)
    return cut.flip(-1) if flip else cut


def centre(image: Tensor, resize: int, size: int) -> Tensor:
    """Resize the short side of uint8 (C, H, W) to `resize` pixels (bicubic), and cut the central (C, size, size): the evaluation
    transform of every stage.

    Of an image whose long side is more than ASPECT times the short one, the ends are cut off first: they are not in the
    central square, and a line of a million pixels would be resized to gigabytes."""
    most = ASPECT * min(image.shape[-2:])
    if max(image.shape[-2:]) > most:  # an even number of pixels is cut, so that the centre stays where it is
        image = F.center_crop(image, [min(side, most + (side - most) % 2) for side in image.shape[-2:]])
    if min(image.shape[-2:]) != resize:
        image = F.resize(image, [resize], interpolation=BICUBIC, antialias=True)
    return F.center_crop(image, [size, size])


def decode_annotation(data: bytes, name: str = "annotation") -> Tensor:
    """Decode a one-channel label image: uint8 (H, W), values as stored. Raises UserError that names it when it is none."""
    try:
        with open_image(data) as image:
            if image.mode not in ("L", "P"):
                raise ValueError(f"mode {image.mode}, expected one 8-bit channel")
            return F.pil_to_tensor(image).squeeze(0)
    except Exception as error:  # PIL raises many kinds for broken files
        raise UserError(f"{name}: its annotation is no readable label image ({error}).") from None
