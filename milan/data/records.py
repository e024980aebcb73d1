"""Packed data sets: a few Arrow IPC (feather) shards per split, memory-mapped, with random access by index.

Columns: image (encoded bytes, verbatim), name, and optionally label, caption and mask (encoded bytes); crc is the CRC-32 of
image and mask. manifest.json beside the shards holds the counts of the splits, the classes, and two digests of each shard:
the SHA-256 of the file, and "index", the digest of all columns but images and masks. The index is compared when a shard is
opened and the CRC-32 when a record is read, so a changed byte is detected where it is used and nothing is read beforehand.
pandas (`pd.read_feather`) and Hugging Face datasets read the shards as they are.
"""

import bisect
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from milan.core.errors import UserError
from milan.core.files import OTHER_DIGEST, damaged, file_digest, json_digest, read_checked, whole_file, write_checked
from milan.params import SceneTraining, stages_of

SCHEMA = {"image": pa.large_binary(), "name": pa.string(), "label": pa.int32(), "caption": pa.string(), "mask": pa.large_binary()}
KINDS = {**SCHEMA, "crc": pa.uint32()}
HEAVY = ("image", "mask")


def write_shard(path: Path, rows: Iterable[dict], columns: Iterable[str]) -> dict:
    """Write rows (dicts with keys of SCHEMA) to a shard, whole or, when the iteration of the rows fails, not at all.

    columns: all keys that the rows have. Returns the shard's entry in the manifest {"file", "images", "sha256", "index"}.
    Raises UserError on a full disk."""
    schema = pa.schema([(name, kind) for name, kind in KINDS.items() if name in {*columns, "crc"}])
    images = 0
    with whole_file(path) as sink, pa.ipc.new_file(sink, schema) as writer:
        # Batches of 256 rows, so that a reader touches only the pages that it needs.
        for chunk in chunks(rows, 256):
            writer.write_batch(pa.RecordBatch.from_pylist([{**row, "crc": record_crc(row)} for row in chunk], schema=schema))
            images += len(chunk)
    return {"file": path.name, "images": images, "sha256": file_digest(path), "index": index_digest(open_shard(path))}


def record_crc(row: dict) -> int:
    """Return the CRC-32 of a row's image and mask."""
    return zlib.crc32(row.get("mask") or b"", zlib.crc32(row["image"]))


def open_shard(path: Path) -> pa.Table:
    """Memory-map a shard, unchecked."""
    return pa.ipc.open_file(pa.memory_map(str(path), "r")).read_all()


def index_digest(table: pa.Table) -> str:
    """Return the digest of all columns; of images and masks only whether they are there (the column crc has their CRC-32)."""
    columns = {name: column.is_valid() if name in HEAVY else column for name, column in zip(table.column_names, table.columns)}
    return json_digest({name: column.to_pylist() for name, column in columns.items()})


def chunks(items: Iterable, size: int) -> Iterator[list]:
    """Yield items in lists of `size`; the last may be shorter."""
    chunk = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def write_manifest(folder: Path, **entries) -> dict:
    """Write manifest.json and return its entries. It is written last, so a folder with a manifest is complete."""
    write_checked(folder / "manifest.json", entries)
    return entries


def drop_unlisted(folder: Path) -> None:
    """Remove files that the manifest does not list: seals (see packing.py) and leftovers of interrupted runs."""
    listed = {shard["file"] for split in read_manifest(folder)["splits"].values() for shard in split["shards"]}
    for path in folder.iterdir():
        if path.name not in {"manifest.json", *listed}:
            path.unlink()


def read_manifest(folder: Path) -> dict:
    """Read manifest.json. Raises UserError when it is missing or damaged."""
    path = Path(folder) / "manifest.json"
    if not path.exists():
        raise UserError(f"{folder} holds no manifest.json, so it is no complete record set: run `dvc repro` to prepare it.")
    manifest = read_checked(path, splits=dict)
    classes = manifest.get("classes", [])
    named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    if not named or not all(well_formed(split) for split in manifest["splits"].values()):
        raise damaged(path, "a split lists no shards with their images, or classes have no names")
    return manifest


def well_formed(split) -> bool:
    """Return whether a split's entry lists shards by plain file names, and counts as many images as they hold."""
    shards = split.get("shards") if isinstance(split, dict) else None
    if not isinstance(shards, list) or not all(isinstance(shard, dict) for shard in shards):
        return False
    names, counts = ([shard.get(key) for shard in shards] for key in ("file", "images"))
    plain = all(isinstance(name, str) and name == Path(name).name and name not in ("", "..") for name in names)
    return plain and all(type(count) is int and count >= 0 for count in counts) and split.get("images") == sum(counts)


def read_shard(path: Path, images: int, classes: int) -> pa.Table:
    """Memory-map a shard of `images` rows, and check its structure and labels without reading the images.

    Arrow follows damaged offsets out of the file, which ends the process, so the check comes first. classes: number of
    classes; 0 leaves the labels unchecked. Raises OSError, ValueError or pa.ArrowException."""
    table = open_shard(path)
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
    """Random access to one split: records[index] -> {"image": bytes, "name": str[, "label": int, ...]}.

    Shards are opened at their first use in each process, so an instance can be sent to data loader workers. Raises UserError
    for a missing split, and for a shard or record that is damaged, when it is used."""

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
        """The names of the classes, in the order of the labels. Raises UserError when the images have no labels."""
        if not self.manifest.get("classes"):
            raise UserError(
                f"{self.folder} has no labels, since data.imagenet is a folder of images without classes. `dvc repro pretrain "
                f"{' '.join(stages_of(SceneTraining))}` needs none. For the other evaluations put the images into "
                "train/<class>/ and val/<class>/."
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
        if record.pop("crc") != record_crc(record):
            raise damaged(self.path(number), f"in record {row} {OTHER_DIGEST}")
        return record

    def column(self, name: str) -> list:
        """Return a whole column, such as "label", without reading the images: None where a shard has no such column. The CRC-32
        of images and masks is not compared."""
        tables = [self.table(number) for number in range(len(self.shards))]
        columns = [table.column(name).to_pylist() if name in table.column_names else [None] * len(table) for table in tables]
        return [value for column in columns for value in column]

    def columns(self, number: int) -> dict[str, pa.ChunkedArray]:
        """Return a shard's columns by name. They are kept, because a look-up takes as long as reading a record."""
        if number not in self._columns:
            table = self.table(number)
            self._columns[number] = {name: table.column(name) for name in table.column_names}
        return self._columns[number]

    def about(self) -> dict:
        """Describe this split for a run's record. The digest is of the digests of its shards."""
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
        """Return the path of a shard."""
        return self.folder / self.shards[number]["file"]

    def table(self, number: int) -> pa.Table:
        """Return a shard, opened and checked at its first use. Raises UserError when it is damaged."""
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
