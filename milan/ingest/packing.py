"""Pack items into record shards. Every image is opened and decoded once here, so that a broken file is reported within minutes
and not in the middle of a night's training.

An item is a record whose image and mask are still places of files (milan/ingest/archives.py), each with read() and identity().
A finished shard stays: beside it lies a seal, a small JSON file, with the key of the items and settings that it was made of. A
later run (after a kill, a full disk, or once broken files are mended) packs only the shards without a valid seal.
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

VOID = 255  # in a mask: a pixel without a class, as 0 is
LISTED = 20  # broken files that an error names
PLACES = ("image", "mask")  # keys whose value is a place in an item and bytes in a record
JOB_IMAGES = 64  # images that a process reads at a time

Job = tuple[dict, int | None, int]  # item, short_side, classes
Result = tuple[dict | None, str | None]  # record and None, or None and what is wrong with the file


@dataclass(frozen=True)
class Packing:
    """The settings of packing into one folder.

    short_side: pixels to which larger images are shrunk (None: keep the files as they are). classes: the largest annotation
    value allowed in masks."""

    folder: Path
    shard_images: int
    processes: int
    short_side: int | None = None
    classes: int = 255

    def pack(self, splits: dict[str, list[dict]]) -> dict[str, dict]:
        """Write the items of each split into shards and return the manifest's entries.

        Raises one UserError that lists the unreadable files of all splits, after all other shards are written."""
        broken: list[str] = []
        entries = {split: self.pack_split(split, items, broken) for split, items in splits.items()}
        if broken:
            broken = list(dict.fromkeys(broken))
            more = f" and {len(broken) - LISTED} more" if len(broken) > LISTED else ""
            files = len({item["image"] for items in splits.values() for item in items})
            raise UserError(
                f"{len(broken)} of {files} files cannot be used: {'; '.join(broken[:LISTED])}{more}. Mend or remove them and run "
                "again: what is packed already is kept."
            )
        return entries

    def pack_split(self, name: str, items: list[dict], broken: list[str]) -> dict:
        """Write the shards of one split and return its entry in the manifest. Faults of files are added to `broken`."""
        chunks = enumerate(records.chunks(items, self.shard_images))
        shards = {self.folder / f"{name}-{number:05d}.arrow": chunk for number, chunk in chunks}
        entries = {path: self.finished(path, shard) for path, shard in shards.items()}
        missing = {path: shard for path, shard in shards.items() if entries[path] is None}
        done = len(items) - sum(map(len, missing.values()))
        keys: dict[Path, str] = {}
        jobs = records.chunks(self.jobs(missing, keys), JOB_IMAGES)
        with closing(ordered(read_jobs, jobs, self.processes)) as results:
            each = track((result for chunk in results for result in chunk), f"packing {name}", len(items), done)
            for path, shard in missing.items():
                entries[path] = self.pack_shard(path, shard, islice(each, len(shard)), keys, broken)
            next(each, None)  # closes the progress
        return {"images": len(items), "shards": list(entries.values())}

    def jobs(self, shards: dict[Path, list[dict]], keys: dict[Path, str]) -> Iterator[Job]:
        """Yield the jobs of the shards. A shard's key is put into `keys` before any of its files is read."""
        for path, shard in shards.items():
            keys[path] = self.key(shard)
            yield from ((item, self.short_side, self.classes) for item in shard)

    def pack_shard(
        self, path: Path, items: list[dict], results: Iterator[Result], keys: dict[Path, str], broken: list[str]
    ) -> dict | None:
        """Write one shard and its seal and return its entry in the manifest.

        Where an item is broken, write nothing, add all of the shard's faults to `broken` and return None."""
        columns = {name for item in items for name in item}
        try:
            entry = records.write_shard(path, unbroken(results), columns)
        except BrokenFile as first:
            broken += [str(first), *(fault for _, fault in results if fault)]
            return None
        write_json(seal_of(path), {"key": keys[path], "bytes": path.stat().st_size, "entry": entry})
        return entry

    def finished(self, path: Path, items: list[dict]) -> dict | None:
        """Return the entry of a shard that exists and was made of exactly these items and settings, else None."""
        if not seal_of(path).exists() or not path.exists():
            return None
        seal = read_json(seal_of(path), key=str, bytes=int, entry=dict)
        valid = seal["bytes"] == path.stat().st_size and seal["key"] == self.key(items)
        return seal["entry"] if valid else None

    def key(self, items: list[dict]) -> str:
        """Return the digest of the settings and of the items, each file by its identity."""
        plain = [{name: value.identity() if name in PLACES else value for name, value in item.items()} for item in items]
        return json_digest(self.short_side, self.classes, plain)


class BrokenFile(Exception):
    """A file that cannot be used; its text names the file and the fault."""


def unbroken(results: Iterable[Result]) -> Iterator[dict]:
    """Yield the records. Raises BrokenFile at the first fault."""
    for record, fault in results:
        if fault:
            raise BrokenFile(fault)
        yield record


def seal_of(path: Path) -> Path:
    return path.with_suffix(".seal")


def read_jobs(jobs: list[Job]) -> list[Result]:
    return [read_job(job) for job in jobs]


def read_job(job: Job) -> Result:
    """Read and check the files of an item."""
    item, short_side, classes = job
    record, place = dict(item), item["image"]
    try:
        item["name"].encode()
        record["image"] = checked_image(place.read(), short_side)
        if "mask" in item:
            place = item["mask"]
            record["mask"] = checked_mask(place.read(), record["image"], classes)
    except UnidentifiedImageError:
        return None, f"{place} (no image: none of {', '.join(KINDS)})"
    except UnicodeEncodeError:
        return None, f"{ascii(str(place))} (the name is not in UTF-8: rename it)"
    except DAMAGE as error:
        return None, f"{place} ({str(error) or type(error).__name__})"
    return record, None


def checked_image(data: bytes, short_side: int | None) -> bytes:
    """Return an image's bytes unchanged, or as a JPEG where it is shrunk to short_side pixels.

    Raises one of DAMAGE or UnidentifiedImageError where the image does not decode."""
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
    """Return whether any pixel of an annotation has a class: a value other than 0 and VOID."""
    with open_image(mask) as image:
        return bool((np.asarray(image) % VOID).any())


def checked_mask(data: bytes, image: bytes, classes: int) -> bytes:
    """Return an annotation's bytes unchanged.

    Raises one of DAMAGE where it does not decode, has another size than the image, or a value above `classes` but VOID."""
    if not data:
        raise ValueError("empty file")
    with open_image(data) as mask, open_image(image) as picture:
        if mask.mode not in ("L", "P"):
            raise ValueError(f"annotation of mode {mask.mode}, expected one 8-bit channel")
        if mask.size != picture.size:
            raise ValueError(f"annotation of {mask.size} for an image of {picture.size}")
        excess = set(np.unique(np.asarray(mask)).tolist()) - {*range(classes + 1), VOID}
    if excess:
        raise ValueError(f"annotation value {min(excess)} with {classes} classes")
    return data
