"""Where an image's bytes are: in a file of their own, in a tar, in a zip or in a row of a parquet file. They are read in place.

A place is small, travels to worker processes, and has `read() -> bytes` (OSError or ValueError when it cannot be read),
`identity()`, which changes when the bytes may have, and a text for messages. Nothing is ever extracted: a member's name is
a label here and no path, and members that are links or that are named like other places are refused all the same.
"""

import gzip
import io
import json
import lzma
import os
import stat
import tarfile
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from milan.core.errors import UserError

LIMIT = 1 << 28  # bytes of a member: no image of ImageNet or ADE20K has a tenth of it, a bomb says more
BLOCK = 512  # of a tar
BATCH = 64  # rows of a parquet file in memory


@dataclass(frozen=True, slots=True)
class File:
    """A file of its own."""

    path: Path

    def read(self) -> bytes:
        return regular(self.path).read_bytes()

    def identity(self) -> list:
        return stamp(self.path)

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True, slots=True)
class Span:
    """A member of a tar, or of a tar in a tar: stored as it is, `size` bytes from `offset` on."""

    archive: Path
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        data = os.pread(opened(in_binary, self.archive).fileno(), self.size, self.offset)
        if len(data) < self.size:
            raise ValueError("the archive ends inside it")
        return data

    def identity(self) -> list:
        return [*stamp(self.archive), self.name, self.offset, self.size]

    def __str__(self) -> str:
        return f"{self.archive.name}: {self.name}"


@dataclass(frozen=True, slots=True)
class Member:
    """A member of a zip, deflated or stored."""

    archive: Path
    name: str
    checksum: int

    def read(self) -> bytes:
        try:
            with opened(zipfile.ZipFile, self.archive).open(self.name) as file:
                return file.read(LIMIT)  # never more than the declared size, which the index has bounded
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, KeyError, NotImplementedError, RuntimeError) as error:
            raise ValueError(f"{error}") from None

    def identity(self) -> list:
        return [*stamp(self.archive), self.name, self.checksum]

    def __str__(self) -> str:
        return f"{self.archive.name}: {self.name}"


@dataclass(frozen=True, slots=True)
class Row:
    """The image of one row of a parquet file; `name` is what the file calls it, if it does."""

    archive: Path
    number: int
    name: str | None

    def read(self) -> bytes:
        try:
            return opened(Rows, self.archive).image(self.number)
        except pa.ArrowException as error:
            raise ValueError(f"{error}") from None

    def identity(self) -> list:
        return [*stamp(self.archive), self.number]

    def __str__(self) -> str:
        return f"{self.archive.name}: row {self.number}" + (f" ({self.name})" if self.name else "")


Place = File | Span | Member | Row


def regular(path: Path) -> Path:
    """The path of a file. Raises OSError when there is none, ValueError when something else is there, such as a pipe, which
    would be waited for."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("no file, but a folder or a pipe")
    return path


def unreadable(path: Path, error: Exception) -> UserError:
    """What to say of a file or a folder that cannot be read, or of a link to none."""
    link = f" (a link to {os.readlink(path)})" if path.is_symlink() else ""
    return UserError(f"{path}{link} cannot be read: {getattr(error, 'strerror', None) or error}. Mend or remove it.")


def stamp(path: Path) -> list:
    """What tells a changed file from an unchanged one: path, size and time of the last change; the path when it is missing."""
    try:
        status = path.stat()
    except (OSError, ValueError):  # ValueError: of a name that no file can have
        return [str(path)]
    return [str(path), status.st_size, status.st_mtime_ns]


def opened(kind: Callable, path: Path):
    """kind(path), the same object at each call: one in each process, since after a fork two would move one file's
    position, and a new one when the file has changed."""
    return _opened(kind, path, os.getpid(), tuple(stamp(path)))


@lru_cache(maxsize=4)
def _opened(kind: Callable, path: Path, process: int, stamped: tuple):
    return kind(path)


def in_binary(path: Path) -> BinaryIO:
    return open(path, "rb")


def plain(name: str, archive: object) -> str:
    """A member's name; UserError for one that leads out of a folder."""
    if not name or name.startswith("/") or "\\" in name or ".." in PurePosixPath(name).parts:
        raise UserError(f"{archive} has a member named {name!r}, as no archive of images should: fetch it from its publisher.")
    return name


def tar_spans(archive: Path, inside: Span | None = None) -> list[Span]:
    """The files of an uncompressed tar, or of the tar that is the member `inside` of it, in the tar's order. Only headers
    are read. Raises UserError when the tar is damaged, ends early, or holds links or names that lead elsewhere."""
    try:
        file = in_binary(regular(archive))
    except (OSError, ValueError) as error:
        raise unreadable(archive, error) from None
    with file:
        start, end = (inside.offset, inside.offset + inside.size) if inside else (0, file.seek(0, os.SEEK_END))
        file.seek(start)
        try:
            members = list(_tar_members(file, end))
        except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
            raise UserError(f"{inside or archive} is no whole, uncompressed tar ({error}): fetch {archive} again.") from None
    for member in members:
        if not member.isreg() or member.issparse():
            raise UserError(f"{inside or archive} has a member that is no plain file: {member.name!r}. Make it without links.")
    return [Span(archive, plain(member.name, inside or archive), member.offset_data, member.size) for member in members]


def _tar_members(file: BinaryIO, end: int) -> Iterator[tarfile.TarInfo]:
    """All but the folders. tarfile takes a broken header for the end of the archive, and follows sizes below zero."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        last = -1
        for member in tar:
            if member.offset <= last or member.size < 0 or member.offset_data + member.size > end:
                raise tarfile.ReadError("it ends inside a member")
            last = member.offset
            if not member.isdir():
                yield member
        file.seek(tar.offset)
        if tar.offset + BLOCK > end or any(file.read(BLOCK)):
            raise tarfile.ReadError(f"no header of a member and no end at byte {tar.offset}")


def tar_texts(archive: Path, *endings: str) -> list[bytes]:
    """The contents of the small members whose names end so, of a tar that may be compressed."""
    found = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(unpacked(archive)), mode="r:") as tar:
            for member in tar:
                if member.size > LIMIT:  # of a sparse one
                    raise tarfile.ReadError("it is larger than any devkit")
                ending = next((e for e in endings if member.name.endswith(e)), None)
                if ending and member.isreg():
                    found[ending] = tar.extractfile(member).read()
    except (tarfile.TarError, OSError, ValueError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{archive} cannot be read ({error}): fetch it again.") from None
    missing = [ending for ending in endings if ending not in found]
    if missing:
        raise UserError(f"{archive} holds no {missing[0]}: fetch it again.")
    return [found[ending] for ending in endings]


def unpacked(archive: Path) -> bytes:
    """A small tar, freed of gzip: tarfile itself would follow a header that says a thousand times what the file holds."""
    with open(regular(archive), "rb") as file:
        gzipped = file.read(2) == b"\x1f\x8b"
    with (gzip.open if gzipped else open)(archive, "rb") as file:
        data = file.read(LIMIT + 1)
    if len(data) > LIMIT:
        raise tarfile.ReadError("it is larger than any devkit")
    return data


def zip_members(archive: Path) -> list[Member]:
    """The files of a zip, in its order. Raises UserError when it is damaged, locked, holds links or names that lead elsewhere,
    or declares members of impossible size."""
    try:
        with zipfile.ZipFile(regular(archive)) as opened_zip:
            members = [member for member in opened_zip.infolist() if not member.is_dir()]
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError) as error:
        raise UserError(f"{archive} is no whole zip ({error}): fetch it again.") from None
    for member in members:
        plain(member.filename, archive)
        if stat.S_ISLNK(member.external_attr >> 16):
            raise UserError(f"{archive} has a member that is a link: {member.filename!r}. Make it without links.")
        if member.flag_bits & 1:
            raise UserError(f"{archive} is locked with a password: unlock it, or give the unpacked folder.")
        if member.file_size > LIMIT:
            raise UserError(f"{archive}: {member.filename!r} would unpack to {member.file_size:,} bytes, which no image has.")
    return [Member(archive, member.filename, member.CRC) for member in members]


def tree(root: Path) -> dict[str, Place]:
    """All files of a folder or a zip: {name relative to it, with slashes: where}, in the order of the names. What is hidden
    (its name, or its folder's, begins with a dot) is passed over, and so are linked folders."""
    if root.is_dir():
        places = {path.relative_to(root).as_posix(): File(path) for path in walked(root)}
    else:
        places = {member.name.removeprefix("./"): member for member in zip_members(root)}
    hidden = {name for name in places if any(part.startswith(".") for part in name.split("/"))}
    return {name: places[name] for name in sorted(places.keys() - hidden)}


def walked(root: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise unreadable(Path(error.filename), error)

    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(folder, name) for name in names)


class Rows:
    """The images of a parquet file, read forwards: a batch of rows is in memory, never a row group, let alone the file."""

    def __init__(self, path: Path):
        self.file = parquet(path)
        about = self.file.metadata
        self.starts = [0, *accumulate(about.row_group(g).num_rows for g in range(about.num_row_groups))]
        self.group, self.start, self.batch = None, 0, []

    def image(self, number: int) -> bytes:
        group = bisect_right(self.starts, number) - 1
        if group != self.group or number < self.start:
            self.rewind(group)
        try:
            while number >= self.start + len(self.batch):
                self.start, self.batch = self.start + len(self.batch), next(self.batches).column(0)
        except BaseException as error:
            self.group = None  # what follows a damaged page has to be looked for from the start
            if isinstance(error, StopIteration):
                raise ValueError("the file ends before this row") from None
            raise
        value = self.batch[number - self.start].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise ValueError("the column image holds no bytes here")
        return data

    def rewind(self, group: int) -> None:
        self.group, self.start, self.batch = group, self.starts[group], []
        self.batches = self.file.iter_batches(BATCH, row_groups=[group], columns=["image"], use_threads=False)


def parquet(path: Path) -> pq.ParquetFile:
    """The file, to be read in small pieces. Raises pa.ArrowException, OSError or ValueError for what is none."""
    return pq.ParquetFile(regular(path), buffer_size=1 << 20)


def parquet_rows(path: Path) -> tuple[list[Row], list[int | None], list[str] | None]:
    """Where the images of a file with the columns image and label are; their labels; and the class names if the file, as those
    of Hugging Face, knows them. Raises UserError for another kind of file."""
    try:
        file = parquet(path)
        schema = file.schema_arrow
        if not {"image", "label"} <= set(schema.names) or not pa.types.is_integer(schema.field("label").type):
            raise UserError(
                f"{path} must have the columns image (bytes) and label (whole numbers); it has {', '.join(schema.names)}."
            )
        if sum(file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)) > path.stat().st_size:
            raise ValueError("it claims more rows than it has bytes")
        kind = schema.field("image").type
        named = pa.types.is_struct(kind) and kind.get_field_index("path") >= 0
        wanted = ["label", *(["image.path"] if named else [])]
        table = file.read(columns=wanted, use_threads=False)
        images = table.column("image").to_pylist() if named else [None] * len(table)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path} is no whole parquet file ({error}): fetch it again.") from None
    names = [image["path"] if image else None for image in images]
    rows = [Row(path, number, name if isinstance(name, str) else None) for number, name in enumerate(names)]
    return rows, table.column("label").to_pylist(), class_label(path, schema.metadata)


def class_label(path: Path, metadata: dict | None) -> list[str] | None:
    """The names of the feature `label` in the schema metadata that Hugging Face's datasets write. Raises UserError for
    anything but a list of distinct names."""
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"]["label"]["names"]
    except (TypeError, KeyError, ValueError):
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise UserError(f"{path}: the names of the feature label, in the metadata, must be a list of distinct words.")
    return names
