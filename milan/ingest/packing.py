"""From items to record shards: every image is opened and decoded once here, so that a broken one is found in minutes rather
than in the middle of a night's training.

A shard that is finished stays. Its seal, a small file beside it until all is done, names what it was made of; a run that
comes after (a killed one, a full disk, broken files that were mended) packs anew only what no seal vouches for.
"""

import io
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from milan.core.errors import UserError
from milan.core.files import json_digest, read_json, write_json
from milan.core.parallel import ordered
from milan.core.progress import track
from milan.data import records
from milan.data.images import DAMAGE, KINDS, open_image, rgb

LISTED = 20
PLACES = ("image", "mask")  # where items hold places and rows bytes


@dataclass(frozen=True)
class Packing:
    """Where shards go and how they are made. short_side: shrink larger images to it (None: keep the files as they are);
    classes: the largest annotation value allowed in masks."""

    folder: Path
    shard_images: int
    processes: int
    short_side: int | None = None
    classes: int = 255

    def pack(self, splits: dict[str, list[dict]]) -> dict[str, dict]:
        """Write the items of each split into shards. Returns the manifest's entries; raises one UserError that lists every
        unreadable file of all splits, once whatever could be packed is packed."""
        broken: list[str] = []
        found = {split: self.split(split, items, broken) for split, items in splits.items()}
        if broken:
            broken = list(dict.fromkeys(broken))
            more = f" and {len(broken) - LISTED} more" if len(broken) > LISTED else ""
            files = len({item["image"] for items in splits.values() for item in items})
            raise UserError(
                f"{len(broken)} of {files} files cannot be used: {'; '.join(broken[:LISTED])}{more}. Mend or remove them and run "
                "again: what is packed already is kept."
            )
        return found

    def split(self, name: str, items: list[dict], broken: list[str]) -> dict:
        """The manifest's entry of one split; what is wrong with its items is added to `broken`."""
        shards = {
            self.folder / f"{name}-{k:05d}.arrow": shard for k, shard in enumerate(records.chunks(items, self.shard_images))
        }
        entries = {path: self.finished(path, shard) for path, shard in shards.items()}
        left = {path: shard for path, shard in shards.items() if entries[path] is None}
        keys: dict[Path, str] = {}
        jobs = records.chunks(self.jobs(left, keys), 64)
        with closing(ordered(read_jobs, jobs, self.processes)) as results:
            each = (result for some in results for result in some)
            each = track(each, f"packing {name}", len(items), len(items) - sum(map(len, left.values())))
            for path, shard in left.items():
                entries[path] = self.shard(path, shard, islice(each, len(shard)), keys, broken)
            next(each, None)  # lets the progress say its end
        return {"images": len(items), "shards": list(entries.values())}

    def jobs(self, shards: dict[Path, list[dict]], keys: dict[Path, str]) -> Iterator[tuple]:
        """What the processes are to read; each shard's key is taken before any of it is read."""
        for path, shard in shards.items():
            keys[path] = self.key(shard)
            yield from ((item, self.short_side, self.classes) for item in shard)

    def shard(
        self, path: Path, items: list[dict], results: Iterator[tuple], keys: dict[Path, str], broken: list[str]
    ) -> dict | None:
        """Write one shard and its seal; with a broken item among them only go on to look for more."""
        columns = {name for item in items for name in item}
        try:
            entry = records.write_shard(path, sound(results), columns)
        except Broken as first:
            broken += [str(first), *(fault for _, fault in results if fault)]
            return None
        write_json(seal(path), {"key": keys[path], "bytes": path.stat().st_size, "entry": entry})
        return entry

    def finished(self, path: Path, items: list[dict]) -> dict | None:
        """The entry of a shard that stands already and was made of just these items."""
        if not seal(path).exists() or not path.exists():
            return None
        found = read_json(seal(path), key=str, bytes=int, entry=dict)
        same = found["bytes"] == path.stat().st_size and found["key"] == self.key(items)
        return found["entry"] if same else None

    def key(self, items: list[dict]) -> str:
        said = [{name: value.identity() if name in PLACES else value for name, value in item.items()} for item in items]
        return json_digest(self.short_side, self.classes, said)


class Broken(Exception):
    """A row that is none; says what is wrong with its file."""


def sound(results: Iterable[tuple[dict | None, str | None]]) -> Iterator[dict]:
    for row, fault in results:
        if fault:
            raise Broken(fault)
        yield row


def seal(path: Path) -> Path:
    return path.with_suffix(".seal")


def read_jobs(jobs: list[tuple]) -> list[tuple]:
    return [read_job(job) for job in jobs]


def read_job(job: tuple[dict, int | None, int]) -> tuple[dict | None, str | None]:
    """(row, None), or (None, what is wrong with the file)."""
    item, short_side, classes = job
    row, place = dict(item), item["image"]
    try:
        item["name"].encode()
        row["image"] = checked_image(place.read(), short_side)
        if "mask" in item:
            place = item["mask"]
            row["mask"] = checked_mask(place.read(), row["image"], classes)
    except UnidentifiedImageError:
        return None, f"{place} (no image: none of {', '.join(KINDS)})"
    except UnicodeEncodeError:
        return None, f"{ascii(str(place))} (the name is not in UTF-8: rename it)"
    except DAMAGE as error:
        return None, f"{place} ({str(error) or type(error).__name__})"
    return row, None


def checked_image(data: bytes, short_side: int | None) -> bytes:
    """An image's bytes, verbatim, once they have proved to decode; re-encoded only when they are to be shrunk."""
    if not data:
        raise ValueError("empty file")
    with open_image(data) as image:
        image.load()
        if short_side is None or min(image.size) <= short_side:
            return data
        factor = short_side / min(image.size)
        size = tuple(max(short_side, round(side * factor)) for side in image.size)
        out = io.BytesIO()
        rgb(image).resize(size, Image.BICUBIC, reducing_gap=3.0).save(out, "JPEG", quality=92, subsampling=0)
        return out.getvalue()


def has_labels(mask: bytes) -> bool:
    """Whether any pixel of an annotation is of a class, neither 0 nor 255."""
    with open_image(mask) as image:
        return bool((np.asarray(image) % 255).any())


def checked_mask(data: bytes, image: bytes, classes: int) -> bytes:
    """An annotation's bytes, once they have proved to fit the image and to name no class beyond the last."""
    if not data:
        raise ValueError("empty file")
    with open_image(data) as mask, open_image(image) as picture:
        if mask.mode not in ("L", "P"):
            raise ValueError(f"annotation of mode {mask.mode}, expected one 8-bit channel")
        if mask.size != picture.size:
            raise ValueError(f"annotation of {mask.size} for an image of {picture.size}")
        strange = set(np.unique(np.asarray(mask)).tolist()) - set(range(classes + 1))
    if strange:
        raise ValueError(f"annotation value {min(strange)} with {classes} classes")
    return data
