"""Read images in place: from a file, a member of a tar or a zip, or a row of a parquet file.

A place says where the bytes of an image are. It is small and can be sent to worker processes. It has `read() -> bytes`
(raises OSError or ValueError), `identity()`, which changes when the bytes may have changed, and a text for messages. Nothing
is extracted, so a member's name is never used as a path; links and names that lead out of the archive are refused anyway.
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
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from milan.core.errors import UserError, listed
from milan.core.validation import is_text

LIMIT = 1 << 28  # bytes of a member; no image of ImageNet or ADE20K has a tenth of it, a decompression bomb has more
BLOCK = 512  # bytes of a tar's block
BATCH = 64  # rows of a parquet file that are held in memory
FOLLOWED = 16  # times that one folder is read through different links
LEFTOVERS = {  # of macOS, Windows, Synology, Linux; in lower case
    "__macosx",
    "icon\r",
    "thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
    "$recycle.bin",
    "system volume information",
    "@eadir",
    "#recycle",
    "lost+found",
}


@dataclass(frozen=True, slots=True)
class File:
    """An image in a file."""

    path: Path

    def read(self) -> bytes:
        return regular(self.path).read_bytes()

    def identity(self) -> list:
        return file_stamp(self.path)

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True, slots=True)
class TarMember:
    """A member of a tar, or of a tar in a tar: `size` bytes at `offset` of the outer file, uncompressed."""

    archive: Path
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        data = os.pread(open_cached(open_binary, self.archive).fileno(), self.size, self.offset)
        if len(data) < self.size:
            raise ValueError("the archive ends inside it")
        return data

    def identity(self) -> list:
        return [*file_stamp(self.archive), self.name, self.offset, self.size]

    def __str__(self) -> str:
        return f"{self.archive.name}: {self.name}"


@dataclass(frozen=True, slots=True)
class ZipMember:
    """A member of a zip, compressed or stored."""

    archive: Path
    name: str
    checksum: int

    def read(self) -> bytes:
        try:
            with open_cached(zipfile.ZipFile, self.archive).open(self.name) as file:
                return file.read(LIMIT)  # at most the declared size, which zip_members has checked
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, KeyError, NotImplementedError, RuntimeError) as error:
            raise ValueError(f"{error}") from None

    def identity(self) -> list:
        return [*file_stamp(self.archive), self.name, self.checksum]

    def __str__(self) -> str:
        return f"{self.archive.name}: {self.name}"


@dataclass(frozen=True, slots=True)
class ParquetRow:
    """The image of one row of a parquet file. name: its name in the file, if it has one."""

    archive: Path
    number: int
    name: str | None

    def read(self) -> bytes:
        try:
            return open_cached(ParquetImages, self.archive).image(self.number)
        except pa.ArrowException as error:
            raise ValueError(f"{error}") from None

    def identity(self) -> list:
        return [*file_stamp(self.archive), self.number]

    def __str__(self) -> str:
        return f"{self.archive.name}: row {self.number}" + (f" ({self.name})" if self.name else "")


Place = File | TarMember | ZipMember | ParquetRow


def regular(path: Path) -> Path:
    """Return the path of a file. Raises OSError when it is missing, and ValueError when it is a folder or a pipe (reading a
    pipe would block)."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("no file, but a folder or a pipe")
    return path


def unreadable(path: Path, error: Exception) -> UserError:
    """Return the error for a file or a folder that cannot be read; it names the target of a link."""
    return UserError(f"{path} {reason(path, error)}. Mend or remove it.")


def reason(path: Path, error: Exception) -> str:
    """Say why a file or a folder cannot be read, with the target of a link."""
    link = f"(a link to {os.readlink(path)}) " if path.is_symlink() else ""
    return f"{link}cannot be read: {getattr(error, 'strerror', None) or error}"


def file_stamp(path: Path) -> list:
    """Return the path, size and modification time of a file, which differ when it has changed; of a missing file the path."""
    try:
        status = path.stat()
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return [str(path)]
    return [str(path), status.st_size, status.st_mtime_ns]


def open_cached(opener: Callable, path: Path):
    """Return opener(path), the same object at each call until the file changes.

    Each process has its own: after a fork two processes would share the position in one file."""
    return _open(opener, path, os.getpid(), tuple(file_stamp(path)))


@lru_cache(maxsize=4)
def _open(opener: Callable, path: Path, process: int, stamp: tuple):
    return opener(path)


def open_binary(path: Path) -> BinaryIO:
    return open(path, "rb")


def refuse_escape(name: str, archive: object) -> None:
    """Raise UserError for a member's name that leads out of the archive."""
    if not name or name.startswith("/") or "\\" in name or ".." in PurePosixPath(name).parts:
        raise UserError(
            f"{archive} has a member named {name!r}, which no archive of images should have: fetch it from its publisher."
        )


def tar_members(archive: Path, inside: TarMember | None = None) -> list[TarMember]:
    """List the files of an uncompressed tar, or of the tar that is its member `inside`, in the tar's order, without the names
    that are passed over.

    Reads headers alone. Raises UserError when the tar is damaged, ends early, or holds links or names that lead out of it."""
    try:
        file = open_binary(regular(archive))
    except (OSError, ValueError) as error:
        raise unreadable(archive, error) from None
    with file:
        start, end = (inside.offset, inside.offset + inside.size) if inside else (0, file.seek(0, os.SEEK_END))
        file.seek(start)
        try:
            members = list(_read_headers(file, end))
        except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
            name = inside or archive
            raise UserError(f"{name} is not a complete, uncompressed tar ({error}): fetch {archive} again.") from None
    for member in members:
        if not member.isreg() or member.issparse():
            raise UserError(f"{inside or archive} has a member that is no plain file: {member.name!r}. Make it without links.")
        refuse_escape(member.name, inside or archive)
    members = [member for member in members if not passed_over(member.name)]
    if twice := [name for name, count in Counter(member.name for member in members).items() if count > 1]:
        raise UserError(f"{inside or archive} has several members of one name: {listed(twice)}. Make it again from the files.")
    return [TarMember(archive, member.name, member.offset_data, member.size) for member in members]


def _read_headers(file: BinaryIO, end: int) -> Iterator[tarfile.TarInfo]:
    """Yield all members but folders. Raises tarfile.ReadError for a broken header, which tarfile itself takes for the end of
    the archive, and for a negative size, which it would follow."""
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
    """Return the contents of the members whose names have these endings, from a small tar that may be compressed. Raises
    UserError when it cannot be read or a member is missing."""
    contents = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(decompress(archive)), mode="r:") as tar:
            for member in tar:
                if member.size > LIMIT:  # a sparse member
                    raise tarfile.ReadError("it is larger than any devkit")
                ending = next((ending for ending in endings if member.name.endswith(ending)), None)
                if ending and member.isreg():
                    contents[ending] = tar.extractfile(member).read()
    except (tarfile.TarError, OSError, ValueError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{archive} cannot be read ({error}): fetch it again.") from None
    missing = [ending for ending in endings if ending not in contents]
    if missing:
        raise UserError(f"{archive} holds no {missing[0]}: fetch it again.")
    return [contents[ending] for ending in endings]


def decompress(archive: Path) -> bytes:
    """Return the bytes of a small tar, without gzip. Raises tarfile.ReadError above LIMIT bytes, which tarfile itself would
    read."""
    with open(regular(archive), "rb") as file:
        gzipped = file.read(2) == b"\x1f\x8b"
    with (gzip.open if gzipped else open)(archive, "rb") as file:
        data = file.read(LIMIT + 1)
    if len(data) > LIMIT:
        raise tarfile.ReadError("it is larger than any devkit")
    return data


def zip_members(archive: Path) -> list[ZipMember]:
    """List the files of a zip, in its order, without the names that are passed over. Raises UserError when it is damaged or
    locked, holds links or names that lead out of it, or declares members of impossible size."""
    try:
        with zipfile.ZipFile(regular(archive)) as file:
            members = [member for member in file.infolist() if not member.is_dir()]
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError) as error:
        raise UserError(f"{archive} is not a complete zip ({error}): fetch it again.") from None
    for member in members:
        refuse_escape(member.filename, archive)
        if stat.S_ISLNK(member.external_attr >> 16):
            raise UserError(f"{archive} has a member that is a link: {member.filename!r}. Make it without links.")
        if member.flag_bits & 1:
            raise UserError(f"{archive} is locked with a password: unlock it, or give the unpacked folder.")
        if member.file_size > LIMIT:
            raise UserError(f"{archive}: {member.filename!r} would unpack to {member.file_size:,} bytes, which no image has.")
    return [ZipMember(archive, member.filename, member.CRC) for member in members if not passed_over(member.filename)]


def passed_over(name: str) -> bool:
    """Return whether a file's name, with slashes, or one of its folders begins with a dot or is what a system leaves behind:
    the one rule for folders, tars, zips and parquet files."""
    return any(part.startswith(".") or part.casefold() in LEFTOVERS for part in PurePosixPath(name).parts)


@dataclass
class Listing:
    """The content of a folder or a zip, without the names that are passed over. All names are relative, with slashes.

    files: {name: place}, in the order of the names. folders: names. lost: {name: reason} of folders that cannot be listed and
    of links to nothing. rings: links that lead back to a folder above them, which are not followed."""

    root: Path
    files: dict[str, Place] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)
    lost: dict[str, str] = field(default_factory=dict)
    rings: list[str] = field(default_factory=list)

    def refuse_lost(self, *areas: str) -> None:
        """Raise UserError where something in these folders is lost ("": in any), since data would be left out."""
        inside = (name for name in self.lost if any(f"{name}/".startswith(f"{area}/" if area else "") for area in areas))
        lost = [f"{self.root / name} {self.lost[name]}" for name in inside]
        if lost:
            raise UserError(f"{listed(lost, separator='; ')}. Mend or remove {'it' if len(lost) == 1 else 'them'}.")

    def tell_unread(self, used: Iterable[Place], known: Callable[[str], bool], more: Iterable[str] = ()) -> None:
        """Print one line that counts and names the files that a layout did not use, by kind, with the names in `more`.

        known: whether a file has its place in the layout though no image lies in it."""
        origins = {origin(place) for place in used}
        unread = [name for name, place in self.files.items() if not known(name) and origin(place) not in origins]
        if unread := [*unread, *self.lost, *self.rings, *more]:
            print(f"Not read in {self.root}: {kinds(unread)}.", flush=True)


def origin(place: Place) -> tuple:
    """Return the file, or the member of a zip, in which a place lies."""
    if isinstance(place, ZipMember):
        return place.archive, place.name
    return (place.path if isinstance(place, File) else place.archive,)


def kinds(names: list[str]) -> str:
    """Count names by their suffix, each kind with an example: "50 .jpg (such as test/1.jpg), 2 .txt (such as a.txt)"."""
    by_suffix: dict[str, list[str]] = {}
    for name in names:
        by_suffix.setdefault(PurePosixPath(name).suffix.lower() or "without a suffix", []).append(name)
    ordered = sorted(by_suffix.items(), key=lambda kind: (-len(kind[1]), kind[0]))
    # repr: a name may hold line breaks, or bytes that are not UTF-8
    return listed([f"{len(some):,} {suffix} (such as {repr(some[0])[1:-1]})" for suffix, some in ordered])


def list_files(root: Path) -> Listing:
    """List a folder, links followed, or a zip. Raises UserError for a zip that cannot be read; what cannot be read in a folder
    is in the listing's `lost`."""
    listing = Listing(root)
    if root.is_dir():
        walk(listing)
    else:
        listing.files.update({str(PurePosixPath(member.name)): member for member in zip_members(root)})
        parents = (PurePosixPath(name).parents for name in listing.files)
        listing.folders.update(str(folder) for folders in parents for folder in folders if folder.name)
    listing.files, listing.lost = (dict(sorted(some.items())) for some in (listing.files, listing.lost))
    listing.rings.sort()
    return listing


def walk(listing: Listing) -> None:
    """Fill a listing from its folder. Links are followed after all else, and each folder FOLLOWED times at most, since links
    may cross in very many ways."""
    times: Counter[str] = Counter()
    waiting: deque[tuple[str, frozenset[str]]] = deque([("", frozenset())])  # a folder, and the real folders above it
    while waiting:
        folder, above = waiting.pop()
        real = os.path.realpath(listing.root / folder)
        if real in above or times[real] >= FOLLOWED:
            listing.rings.append(folder)
            continue
        times[real] += 1
        listing.folders.update([folder] if folder else [])
        try:
            entries = list(os.scandir(listing.root / folder))
        except OSError as error:
            listing.lost[folder] = reason(listing.root / folder, error)
            continue
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if passed_over(entry.name):
                continue
            path = listing.root / name
            try:
                is_folder = stat.S_ISDIR(path.stat().st_mode) if entry.is_symlink() else entry.is_dir()
            except OSError as error:
                listing.lost[name] = reason(path, error)
                continue
            if is_folder:
                (waiting.appendleft if entry.is_symlink() else waiting.append)((name, above | {real}))
            else:
                listing.files[name] = File(path)


class ParquetImages:
    """The images of a parquet file, read forwards. Memory holds one batch of rows, never a row group or the file."""

    def __init__(self, path: Path):
        self.file = open_parquet(path)
        metadata = self.file.metadata
        sizes = (metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
        self.starts = [0, *accumulate(sizes)]
        self.group, self.start, self.batch = None, 0, []

    def image(self, number: int) -> bytes:
        """Return the image of a row. Raises pa.ArrowException, OSError or ValueError when it cannot be read."""
        group = bisect_right(self.starts, number) - 1
        if group != self.group or number < self.start:
            self.rewind(group)
        try:
            while number >= self.start + len(self.batch):
                self.start, self.batch = self.start + len(self.batch), next(self.batches).column(0)
        except BaseException as error:
            self.group = None  # after a damaged page the next read starts at the group's first row
            if isinstance(error, StopIteration):
                raise ValueError("the file ends before this row") from None
            raise
        value = self.batch[number - self.start].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise ValueError("the column image holds no bytes here")
        return data

    def rewind(self, group: int) -> None:
        """Start reading at the first row of a row group."""
        self.group, self.start, self.batch = group, self.starts[group], []
        self.batches = self.file.iter_batches(BATCH, row_groups=[group], columns=["image"], use_threads=False)


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a parquet file for reading in small pieces. Raises pa.ArrowException, OSError or ValueError when it is none."""
    return pq.ParquetFile(regular(path), buffer_size=1 << 20)


def parquet_rows(path: Path) -> tuple[list[ParquetRow], list[int | None], list[str] | None]:
    """Index a parquet file with the columns image and label: return its rows, their labels, and the class names if it has them,
    as the files of Hugging Face do. Raises UserError for another kind of file."""
    try:
        file = open_parquet(path)
        schema = file.schema_arrow
        if not {"image", "label"} <= set(schema.names) or not pa.types.is_integer(schema.field("label").type):
            raise UserError(
                f"{path} must have the columns image (bytes) and label (whole numbers); it has {', '.join(schema.names)}."
            )
        if sum(file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)) > path.stat().st_size:
            raise ValueError("it claims more rows than it has bytes")
        kind = schema.field("image").type
        named = pa.types.is_struct(kind) and kind.get_field_index("path") >= 0
        columns = ["label", *(["image.path"] if named else [])]
        table = file.read(columns=columns, use_threads=False)
        images = table.column("image").to_pylist() if named else [None] * len(table)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path} is not a complete parquet file ({error}): fetch it again.") from None
    names = [image["path"] if image else None for image in images]
    rows = [ParquetRow(path, number, name if isinstance(name, str) else None) for number, name in enumerate(names)]
    return rows, table.column("label").to_pylist(), label_names(path, schema.metadata)


def label_names(path: Path, metadata: dict | None) -> list[str] | None:
    """Return the class names in the schema metadata that Hugging Face's datasets write; None without such metadata. Raises
    UserError for anything but a list of distinct names."""
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"]["label"]["names"]
    except (TypeError, KeyError, ValueError, RecursionError):  # RecursionError: nested too deep to be anybody's metadata
        return None
    words = isinstance(names, list) and all(isinstance(name, str) and is_text(name) for name in names)
    if not words or len(set(names)) < len(names):
        raise UserError(f"{path}: the names of the feature label, in the metadata, must be a list of distinct words.")
    return names
