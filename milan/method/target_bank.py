"""The target bank: teacher features and importance of V fixed views of every image, written shard by shard.

View v of image i is a random resized crop drawn from (seed, "view", v, i). Pretraining's epoch e uses view
e mod V. Files are plain .npy, memory-mapped: features-00000.npy float16 (n, V, 1+N, D), importance-00000.npy
float32 (n, V, N), boxes-00000.npy int32 (n, V, 5) = top, left, height, width, flip, and crc-00000.npy uint32
(n, V, 3), the CRC-32 of each of the three, which every reading of a view compares. bank.json is written last.
"""

import hashlib
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from milan.core.errors import UserError
from milan.core.files import OTHER_DIGEST, damaged, existing_parent, full_disk_said, read_checked, write_checked
from milan.data import seeding, transforms

# kind of number, dimensions; of the checksums, one for each of the others
ARRAYS = {"features": (np.float16, 4), "importance": (np.float32, 3), "boxes": (np.int32, 3)}
FILES = {**ARRAYS, "crc": (np.uint32, 3)}


def view_box(seed: int, view: int, index: int, height: int, width: int, scale: list[float]) -> tuple[int, int, int, int, bool]:
    """Crop box and flip of one view of one image."""
    return transforms.draw_crop(height, width, scale, seeding.generator(seed, "view", view, index))


def bank_bytes(images: int, views: int, n_patches: int, feature_dim: int) -> int:
    """Size of a bank on disk."""
    return images * views * ((1 + n_patches) * feature_dim * 2 + n_patches * 4 + 5 * 4 + 3 * 4)


def refuse_when_too_big(folder: Path, size: int) -> None:
    """Say the size, and raise UserError when the disk has not got it."""
    free = shutil.disk_usage(existing_parent(folder)).free
    print(f"target bank: {in_words(size)} to write, {in_words(free)} free", flush=True)
    if size > free:
        raise UserError(
            f"The target bank needs {in_words(size)} and the disk of {folder} has {in_words(free)} free. Free some, lower "
            "extract_targets.views, or set it to 0: then the teacher runs inside pretraining, as published."
        )


def in_words(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def write_shard(folder: Path, number: int, arrays: dict[str, np.ndarray]) -> None:
    """One shard, whole: each array under a temporary name, then renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in {**arrays, "crc": crc(arrays)}.items():
        path = folder / f"{name}-{number:05d}.npy"
        with full_disk_said(path):
            np.save(path.with_suffix(".part.npy"), array, allow_pickle=False)
            os.replace(path.with_suffix(".part.npy"), path)


def crc(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """uint32 (n, V, 3), in the order of ARRAYS."""
    rows, views = arrays["boxes"].shape[:2]
    return np.array(
        [[[zlib.crc32(arrays[name][i, v].tobytes()) for name in ARRAYS] for v in range(views)] for i in range(rows)], np.uint32
    )


def content_digest(folder: Path) -> str:
    """Digest of a finished bank's content, however it is cut into shards. Raises UserError when the bank is not complete."""
    return Bank(folder).info["content"]


def has_shard(folder: Path, number: int) -> bool:
    return all((folder / f"{name}-{number:05d}.npy").exists() for name in FILES)


def finish(folder: Path, *, views: int, shard_images: int, feature_dim: int, images: int) -> None:
    """Write bank.json, with a digest of the shards' content: of every view's CRC-32, in the order of the images."""
    digest = hashlib.sha256(f"{images} images, {views} views, {feature_dim} features".encode())
    for number in range(-(-images // shard_images) if views else 0):
        digest.update(np.load(folder / f"crc-{number:05d}.npy", allow_pickle=False).tobytes())
    entries = {"views": views, "shard_images": shard_images, "feature_dim": feature_dim, "images": images}
    write_checked(folder / "bank.json", {**entries, "content": digest.hexdigest()})


class Bank:
    """Random access: bank[view, index] -> (box, features float16 (1+N, D), importance (N,))."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        path = self.folder / "bank.json"
        if not path.exists():
            raise UserError(f"{folder} holds no bank.json, so it is no complete target bank: run `dvc repro` to extract it.")
        self.info = read_checked(path, views=int, shard_images=int, feature_dim=int, images=int, content=str)
        sizes = [self.info[name] for name in ("views", "shard_images", "feature_dim", "images")]
        if min(sizes) < 1:
            raise UserError(f"{path} tells of no views, or of no images: set extract_targets.views and run `dvc repro` again.")
        self.views, self.shard_images, self.feature_dim, self.images = sizes
        self._arrays: dict[tuple[str, int], np.ndarray] = {}

    def __getitem__(self, place: tuple[int, int]) -> tuple[tuple, Tensor, Tensor]:
        view, index = place
        if index >= self.images:
            raise UserError(f"{self.folder} is the bank of {self.images} images, and of none beyond. Run `dvc repro` again.")
        number, row = divmod(index, self.shard_images)
        features, importance, box = (self.sound(name, number, row, view) for name in ARRAYS)
        top, left, height, width, flip = box.tolist()
        return (top, left, height, width, bool(flip)), torch.from_numpy(features), torch.from_numpy(importance)

    def sound(self, name: str, number: int, row: int, view: int) -> np.ndarray:
        """A view's part of an array, copied, its CRC-32 compared."""
        found = self.array(name, number)[row, view].copy()
        if zlib.crc32(found.data) != self.array("crc", number)[row, view, list(ARRAYS).index(name)]:
            raise damaged(self.file(name, number), f"of row {row}, view {view} {OTHER_DIGEST}")
        return found

    def file(self, name: str, number: int) -> Path:
        return self.folder / f"{name}-{number:05d}.npy"

    def array(self, name: str, number: int) -> np.ndarray:
        if (name, number) not in self._arrays:
            path = self.file(name, number)
            try:
                self._arrays[name, number] = self.checked(np.lib.format.open_memmap(path, mode="r"), name, number)
            except Exception as error:  # numpy reads the header as Python, and raises many kinds
                raise damaged(path, f"it cannot be read ({error})") from None
        return self._arrays[name, number]

    def checked(self, array: np.ndarray, name: str, number: int) -> np.ndarray:
        """The array, once it has proved to be what bank.json says of it."""
        kind, dimensions = FILES[name]
        rows = min(self.shard_images, self.images - number * self.shard_images)
        last = {"features": self.feature_dim, "boxes": 5, "crc": len(ARRAYS)}.get(name, array.shape[-1] if array.ndim else 0)
        if array.dtype != kind or array.ndim != dimensions or (*array.shape[:2], array.shape[-1]) != (rows, self.views, last):
            raise ValueError(f"{array.dtype} {list(array.shape)}, which is not what bank.json says")
        return array

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_arrays": {}}
