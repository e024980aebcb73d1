"""Packed data sets: a few Arrow IPC (feather) shards a split, memory-mapped, random access by index.

Columns: image (encoded bytes, verbatim), name, and where there is one label, caption, mask (encoded bytes); crc is the
CRC-32 of image and mask, which every reading of a record compares. manifest.json beside the shards counts the splits,
lists the classes and the shards' SHA-256 digests: of the file, and of all but images and masks ("index"), which is compared
when a shard is opened. So a byte that has changed is found where it would be used, at no cost before. pandas
(`pd.read_feather`) and Hugging Face datasets read the shards as they are.
"""

import bisect
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from milan.core.errors import UserError
from milan.core.files import OTHER_DIGEST, damaged, file_digest, json_digest, read_checked, whole_file, write_checked

SCHEMA = {"image": pa.large_binary(), "name": pa.string(), "label": pa.int32(), "caption": pa.string(), "mask": pa.large_binary()}
KINDS = {**SCHEMA, "crc": pa.uint32()}
HEAVY = ("image", "mask")


def write_shard(path: Path, rows: Iterable[dict], columns: Iterable[str]) -> dict:
    """Write rows (dicts with any of SCHEMA's keys) under path, or nothing at all when the rows end in an error.

    columns: all keys of the rows. Returns the shard's entry in the manifest {"file", "images", "sha256", "index"}. Raises
    UserError on a full disk."""
    schema = pa.schema([(name, kind) for name, kind in KINDS.items() if name in {*columns, "crc"}])
    images = 0
    with whole_file(path) as sink, pa.ipc.new_file(sink, schema) as writer:
        # One batch an image batch of 256: a reader touches only the pages that it needs.
        for chunk in chunks(rows, 256):
            writer.write_batch(pa.RecordBatch.from_pylist([{**row, "crc": crc(row)} for row in chunk], schema=schema))
            images += len(chunk)
    return {"file": path.name, "images": images, "sha256": file_digest(path), "index": index_digest(opened(path))}


def crc(row: dict) -> int:
    return zlib.crc32(row.get("mask") or b"", zlib.crc32(row["image"]))


def opened(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path), "r")).read_all()


def index_digest(table: pa.Table) -> str:
    """Digest of all that is small: names, labels, captions, and of images and masks the CRC-32 and whether they are there."""
    small = {name: column.is_valid() if name in HEAVY else column for name, column in zip(table.column_names, table.columns)}
    return json_digest({name: column.to_pylist() for name, column in small.items()})


def chunks(items: Iterable, size: int) -> Iterator[list]:
    chunk = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def write_manifest(folder: Path, **entries) -> dict:
    """Write manifest.json whole; it is written last, so that a folder with a manifest is complete."""
    write_checked(folder / "manifest.json", entries)
    return entries


def drop_unlisted(folder: Path) -> None:
    """Remove the files that the manifest does not name: seals, and leftovers of interrupted runs."""
    listed = {shard["file"] for split in read_manifest(folder)["splits"].values() for shard in split["shards"]}
    for path in folder.iterdir():
        if path.name not in {"manifest.json", *listed}:
            path.unlink()


def read_manifest(folder: Path) -> dict:
    path = Path(folder) / "manifest.json"
    if not path.exists():
        raise UserError(f"{folder} holds no manifest.json, so it is no complete record set: run `dvc repro` to prepare it.")
    found = read_checked(path, splits=dict)
    named = isinstance(found.get("classes", []), list) and all(isinstance(name, str) for name in found.get("classes", []))
    if not named or not all(well_formed(split) for split in found["splits"].values()):
        raise damaged(path, "a split lists no shards with their images, or classes have no names")
    return found


def well_formed(split) -> bool:
    """Whether an entry of a split has what write_shard gave it: shards by plain names, and as many images as these hold."""
    shards = split.get("shards") if isinstance(split, dict) else None
    if not isinstance(shards, list) or not all(isinstance(shard, dict) for shard in shards):
        return False
    names, counts = ([shard.get(key) for shard in shards] for key in ("file", "images"))
    plain = all(isinstance(name, str) and name == Path(name).name and name not in ("", "..") for name in names)
    return plain and all(type(n) is int and n >= 0 for n in counts) and split.get("images") == sum(counts)


def read_shard(path: Path, images: int, classes: int) -> pa.Table:
    """A shard, memory-mapped. Its bookkeeping is checked, since Arrow would follow a damaged one out of the file and end
    the process; the images' bytes are not touched. Raises OSError, ValueError or pa.ArrowException."""
    table = opened(path)
    table.validate(full=True)
    kinds = {field.name: field.type for field in table.schema}
    if (
        not {"image", "crc"} <= kinds.keys()
        or any(KINDS.get(name) != kind for name, kind in kinds.items())
        or len(table) != images
    ):
        raise ValueError("its rows or columns are not those of the manifest")
    if table.column("image").null_count:
        raise ValueError("a row without an image")
    labels = table.column("label").to_numpy() if "label" in kinds and classes else np.zeros(0)
    if not all(0 <= label < classes for label in np.unique(labels)):
        raise ValueError(f"a label that is none of the {classes} classes")
    return table


class Records:
    """Random access to one split: records[i] -> {"image": bytes, "label": int, ...}; len(records).

    Shards are opened on first touch in each process, so an instance can be sent to data loader workers."""

    def __init__(self, folder: str | Path, split: str):
        self.folder, self.split = Path(folder), split
        self.manifest = read_manifest(self.folder)
        if split not in self.manifest["splits"]:
            raise UserError(f"{folder} has no split {split!r}; it has {', '.join(self.manifest['splits'])}.")
        self.shards = self.manifest["splits"][split]["shards"]
        self.starts = [0]
        for shard in self.shards:
            self.starts.append(self.starts[-1] + shard["images"])
        self._tables: dict[int, pa.Table] = {}
        self._columns: dict[int, dict[str, pa.ChunkedArray]] = {}

    @property
    def classes(self) -> list[str]:
        """The names of the classes, in the order of the labels. Raises UserError when the images came without labels."""
        if not self.manifest.get("classes"):
            raise UserError(
                f"{self.folder} has no labels, since data.imagenet is a folder of images without classes. What needs none: "
                "`dvc repro pretrain segment`. For linear evaluation and fine-tuning put the images into train/<class>/ and "
                "val/<class>/."
            )
        return self.manifest["classes"]

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        number = bisect.bisect_right(self.starts, index) - 1
        row = index - self.starts[number]
        record = {name: column[row].as_py() for name, column in self.columns(number).items()}
        if record.pop("crc") != crc(record):
            raise damaged(self.path(number), f"of record {row} {OTHER_DIGEST}")
        return record

    def column(self, name: str) -> list:
        """A whole column, such as "label", without touching the images; of image and mask no CRC-32 is compared."""
        return [value for number in range(len(self.shards)) for value in self.table(number).column(name).to_pylist()]

    def columns(self, number: int) -> dict[str, pa.ChunkedArray]:
        """A shard's columns by name; looking them up anew takes as long as reading a record."""
        if number not in self._columns:
            table = self.table(number)
            self._columns[number] = {name: table.column(name) for name in table.column_names}
        return self._columns[number]

    def about(self) -> dict:
        """What tells this split from any other, for a run's record; the digest is of the shards' digests."""
        schema = self.table(0).schema if self.shards else ()
        return {
            "name": f"{self.folder.name} {self.split}",
            "context": "validation" if self.split == "val" else "training",
            "path": str(self.folder),
            "digest": json_digest([shard.get("sha256") for shard in self.shards]),
            "images": len(self),
            "classes": self.manifest.get("classes", []),
            "columns": {field.name: str(field.type) for field in schema if field.name in SCHEMA},
        }

    def path(self, number: int) -> Path:
        return self.folder / self.shards[number]["file"]

    def table(self, number: int) -> pa.Table:
        if number not in self._tables:
            path = self.path(number)
            try:
                table = read_shard(path, self.shards[number]["images"], len(self.manifest.get("classes", [])))
                digest = index_digest(table)
            except Exception as error:  # pyarrow raises many kinds
                raise damaged(path, f"it cannot be read ({error})") from None
            if digest != self.shards[number]["index"]:
                raise damaged(path, OTHER_DIGEST)
            self._tables[number] = table
        return self._tables[number]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_tables": {}, "_columns": {}}
