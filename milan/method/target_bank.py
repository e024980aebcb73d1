"""The target bank: the teacher's features and importance of V fixed views of every image, written shard by shard.

View v of image i is a random resized crop drawn from (seed, "view", v, i). Epoch e of pretraining uses view e mod V. The files
of a shard of n images are plain .npy, memory-mapped (N patches, D feature width):

    features-00000.npy    float16 (n, V, 1+N, D)   class token, then patches
    importance-00000.npy  float32 (n, V, N)
    boxes-00000.npy       int32 (n, V, 5)          top, left, height, width in pixels of the image; flip
    crc-00000.npy         uint32 (n, V, 3)         CRC-32 of each of the above, compared whenever a view is read

bank.json, with the bank's sizes and a digest of its content, is written last: a folder that has it is complete.
"""

import hashlib
import shutil
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from milan.core.errors import UserError
from milan.core.files import OTHER_DIGEST, damaged, existing_parent, read_checked, whole_file, write_checked
from milan.data import seeding, transforms

# name: dtype and number of dimensions
ARRAYS = {"features": (np.float16, 4), "importance": (np.float32, 3), "boxes": (np.int32, 3)}
FILES = {**ARRAYS, "crc": (np.uint32, 3)}


def view_box(seed: int, view: int, index: int, height: int, width: int, scale: list[float]) -> tuple[int, int, int, int, bool]:
    """Draw one view of one image of height x width pixels: (top, left, height, width, flip).

    scale: smallest and largest share of the image's area."""
    return transforms.draw_crop(height, width, scale, seeding.generator(seed, "view", view, index))


def bank_bytes(images: int, views: int, n_patches: int, feature_dim: int) -> int:
    """Return the size of a bank's arrays in bytes."""
    return images * views * ((1 + n_patches) * feature_dim * 2 + n_patches * 4 + 5 * 4 + 3 * 4)


def refuse_when_too_big(folder: Path, size: int) -> None:
    """Print the size of a bank (bytes) and raise UserError when the disk has less free."""
    free = shutil.disk_usage(existing_parent(folder)).free
    print(f"target bank: {readable(size)} to write, {readable(free)} free", flush=True)
    if size > free:
        raise UserError(
            f"The target bank needs {readable(size)} and the disk of {folder} has {readable(free)} free. Free some, lower "
            "extract_targets.views, or set it to 0: then the teacher runs inside pretraining, as published."
        )


def readable(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def write_shard(folder: Path, number: int, arrays: dict[str, np.ndarray]) -> None:
    """Write one shard. arrays: {name of ARRAYS: C-contiguous array}. Each file is written whole or not at all.

    Raises UserError on a full disk."""
    for name, array in {**arrays, "crc": checksums(arrays)}.items():
        with whole_file(folder / f"{name}-{number:05d}.npy") as file:
            # As np.save does, which does not tell a full disk from other errors.
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
            file.write(array.data)


def checksums(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Return the CRC-32 of every view of every array: uint32 (n, V, 3), in the order of ARRAYS."""
    images, views = arrays["boxes"].shape[:2]
    return np.array(
        [
            [[zlib.crc32(arrays[name][image, view].tobytes()) for name in ARRAYS] for view in range(views)]
            for image in range(images)
        ],
        np.uint32,
    )


def content_digest(folder: Path) -> str:
    """Return the digest of a bank's content, which does not depend on the size of its shards. Raises UserError when the bank is
    not complete."""
    return Bank(folder).info["content"]


def has_shard(folder: Path, number: int) -> bool:
    """Return whether all files of a shard exist."""
    return all((folder / f"{name}-{number:05d}.npy").exists() for name in FILES)


def finish(folder: Path, *, views: int, shard_images: int, feature_dim: int, images: int) -> None:
    """Write bank.json once all shards are written. The content's digest is that of every view's CRC-32, image by image."""
    digest = hashlib.sha256(f"{images} images, {views} views, {feature_dim} features".encode())
    for number in range(-(-images // shard_images) if views else 0):
        digest.update(np.load(folder / f"crc-{number:05d}.npy", allow_pickle=False).tobytes())
    entries = {"views": views, "shard_images": shard_images, "feature_dim": feature_dim, "images": images}
    write_checked(folder / "bank.json", {**entries, "content": digest.hexdigest()})


class Bank:
    """A complete bank, read at random: bank[view, index] is ((top, left, height, width, flip), features float16 (1+N, D),
    importance float32 (N,)). Raises UserError where the bank is incomplete, or damaged by even one bit."""

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

    def __getitem__(self, key: tuple[int, int]) -> tuple[tuple, Tensor, Tensor]:
        view, index = key
        if index >= self.images:
            raise UserError(f"{self.folder} is the bank of {self.images} images, and of none beyond. Run `dvc repro` again.")
        number, row = divmod(index, self.shard_images)
        features, importance, box = (self.read(name, number, row, view) for name in ARRAYS)
        top, left, height, width, flip = box.tolist()
        return (top, left, height, width, bool(flip)), torch.from_numpy(features), torch.from_numpy(importance)

    def read(self, name: str, number: int, row: int, view: int) -> np.ndarray:
        """Return a copy of one view's part of an array, once its CRC-32 is compared."""
        values = self.array(name, number)[row, view].copy()
        if zlib.crc32(values.data) != self.array("crc", number)[row, view, list(ARRAYS).index(name)]:
            raise damaged(self.file(name, number), f"of row {row}, view {view} {OTHER_DIGEST}")
        return values

    def file(self, name: str, number: int) -> Path:
        return self.folder / f"{name}-{number:05d}.npy"

    def array(self, name: str, number: int) -> np.ndarray:
        """Return an array of a shard, memory-mapped and kept open."""
        if (name, number) not in self._arrays:
            path = self.file(name, number)
            try:
                self._arrays[name, number] = self.checked(np.lib.format.open_memmap(path, mode="r"), name, number)
            except Exception as error:  # numpy reads the header as Python, and raises many kinds
                raise damaged(path, f"it cannot be read ({error})") from None
        return self._arrays[name, number]

    def checked(self, array: np.ndarray, name: str, number: int) -> np.ndarray:
        """Return the array. Raises ValueError where dtype or shape are not as bank.json says."""
        dtype, dimensions = FILES[name]
        images = min(self.shard_images, self.images - number * self.shard_images)
        last = {"features": self.feature_dim, "boxes": 5, "crc": len(ARRAYS)}.get(name, array.shape[-1] if array.ndim else 0)
        if array.dtype != dtype or array.ndim != dimensions or (*array.shape[:2], array.shape[-1]) != (images, self.views, last):
            raise ValueError(f"{array.dtype} {list(array.shape)}, which is not what bank.json says")
        return array

    def __getstate__(self) -> dict:
        """Leave out the open files: every loader's worker opens its own."""
        return {**self.__dict__, "_arrays": {}}
