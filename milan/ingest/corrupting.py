"""Corrupt images in five ways and five strengths, and write them in ImageNet-C's layout.

The strengths are those of Tiny ImageNet-C, of contrast those of CIFAR-10-C (hendrycks/robustness, ImageNet-C/create_c/); the
radii of the blur are ours, for images of 48 pixels. Noise is keyed by (seed, "corruption", severity, index).
"""

import io
import re
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import convolve

from milan.core.parallel import ordered
from milan.data import seeding, transforms
from milan.data.corruptions import SEVERITIES
from milan.data.records import Records, chunks

SAVED = {"format": "JPEG", "quality": 95, "subsampling": 0}
JOB_IMAGES = 20


def write_corrupted(root: Path, val: Records, per_class: int, seed: int, view: tuple[int, int], processes: int) -> dict[str, int]:
    """Write the first per_class images of each class to root/<corruption>/<severity>/<folder>/<index>.JPEG, and return {folder:
    label} of the classes that have images.

    view: (resize, size) of the evaluation view, which is cut out first, as ImageNet-C's own images are."""
    places: dict[int, list[int]] = {}
    for index, label in enumerate(val.column("label")):
        places.setdefault(label, []).append(index)
    chosen = [index for indices in places.values() for index in indices[:per_class]]
    folders = {label: class_folder(val.manifest["wnids"][label], label) for label in places}
    with closing(ordered(partial(write_images, root, val, folders, seed, view), chunks(chosen, JOB_IMAGES), processes)) as written:
        for _ in written:
            pass
    return {folder: label for label, folder in folders.items()}


def class_folder(wnid: str, label: int) -> str:
    """Return the name of a class's folder: its WordNet id, else its label, because other names may be no names of folders."""
    return wnid if re.fullmatch(r"n\d{8}", wnid) else str(label)


def write_images(
    root: Path, val: Records, folders: dict[int, str], seed: int, view: tuple[int, int], indices: list[int]
) -> None:
    """Write all corrupted versions of these validation images. folders: by label."""
    for index in indices:
        record = val[index]
        image = transforms.centre(transforms.decode(record["image"], record["name"]), *view).permute(1, 2, 0).numpy()
        for corruption, severity, version in versions(image, seed, index):
            path = root / corruption / severity / folders[record["label"]] / f"{index:08d}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(version).save(path, **SAVED)


def versions(image: np.ndarray, seed: int, index: int) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield (corruption, severity, image) for all of STRENGTHS; images are (S, S, 3) uint8."""
    for name, (corrupt, strengths) in STRENGTHS.items():
        for severity, strength in zip(SEVERITIES, strengths, strict=True):
            generator = np.random.default_rng(seeding.key(seed, "corruption", int(severity), index))
            yield name, severity, corrupt(image, strength, generator)


def noisy(image: np.ndarray, deviation: float, generator: np.random.Generator) -> np.ndarray:
    """Add noise of this standard deviation, where the range of a channel is 1."""
    return to_bytes(image + 255 * deviation * generator.standard_normal(image.shape))


def defocused(image: np.ndarray, share: float, _) -> np.ndarray:
    """Blur with a disk, whose radius is this share of the image's side; a pixel at its edge counts in part."""
    radius = share * len(image)
    axis = np.arange(-np.ceil(radius), np.ceil(radius) + 1)
    disk = (radius + 0.5 - np.hypot(*np.meshgrid(axis, axis))).clip(0, 1)
    return to_bytes(convolve(image.astype(float), (disk / disk.sum())[..., None], mode="mirror"))


def faded(image: np.ndarray, left: float, _) -> np.ndarray:
    """Leave this share of the contrast of each channel about its mean."""
    mean = image.mean(axis=(0, 1))
    return to_bytes(mean + left * (image - mean))


def pixelated(image: np.ndarray, share: float, _) -> np.ndarray:
    """Shrink the image to this share of its side, and enlarge it again."""
    side = len(image)
    small = Image.fromarray(image).resize((int(side * share),) * 2, Image.BOX)
    return np.asarray(small.resize((side, side), Image.BOX))


def compressed(image: np.ndarray, quality: int, _) -> np.ndarray:
    """Compress as a JPEG of this quality."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def to_bytes(values: np.ndarray) -> np.ndarray:
    return values.round().clip(0, 255).astype(np.uint8)


STRENGTHS = {  # corruption: its function, and its strength in each severity
    "gaussian_noise": (noisy, (0.04, 0.08, 0.12, 0.15, 0.18)),
    "defocus_blur": (defocused, (0.75 / 48, 1 / 48, 1.5 / 48, 2 / 48, 2.5 / 48)),
    "contrast": (faded, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "pixelate": (pixelated, (0.9, 0.8, 0.7, 0.6, 0.5)),
    "jpeg_compression": (compressed, (65, 58, 50, 40, 25)),
}
