"""Atomic writing of files and folders, JSON with a digest, and digests of files."""

import contextlib
import errno
import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from milan.core.errors import UserError

OTHER_DIGEST = "the digest is not the one that it was written with"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
ROOM = dict.fromkeys(
    FULL,
    "Free some space (`dvc gc --all-commits --all-experiments` drops the results that no commit and no experiment uses; not "
    "in a cache that projects share)",
) | {errno.EFBIG: "Raise the limit (`ulimit -f unlimited`), or move the project off a file system such as FAT,"}
REFUSED = (  # errors of the file system that the user can mend
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ELOOP,
    errno.ENAMETOOLONG,
)


def project_root() -> Path:
    """Return the repository's root, also from a temporary workspace of `dvc exp run --queue` or `--temp` (.dvc/tmp/exps/...)."""
    here = Path.cwd()
    return Path(*here.parts[: here.parts.index(".dvc")]) if ".dvc" in here.parts else here


SCRATCH = Path(os.path.relpath(project_root() / ".scratch"))  # one for all workspaces: it outlives a temporary one


def json_digest(*parts) -> str:
    """Return 16 hex digits of a SHA-256 over JSON; values that JSON lacks count by their repr."""
    text = json.dumps(parts, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def dvc_hash(path: Path, limit: int = 2 << 30) -> str | None:
    """Return DVC's hash of a file (its MD5) or a folder (the MD5 of its listing, and ".dir"), or None above `limit` bytes.

    With it a run can be found from dvc.lock and back. Above the limit a second hashing beside DVC's own takes too long."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    if sum(file.stat().st_size for file in files) > limit:
        return None
    if path.is_file():
        return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    listing = [{"md5": dvc_hash(file), "relpath": file.relative_to(path).as_posix()} for file in files]
    listing.sort(key=lambda entry: entry["relpath"])
    return hashlib.md5(json.dumps(listing, sort_keys=True).encode(), usedforsecurity=False).hexdigest() + ".dir"


@contextlib.contextmanager
def explain_full_disk(path: Path) -> Iterator[None]:
    """Raise "no space left" as a UserError that names the place."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        free = shutil.disk_usage(existing_parent(path)).free
        full = f"The disk that holds {path} is full ({free / 1e6:.1f} MB free)."
        if error.errno == errno.EFBIG:
            full = f"{path} would be larger than a file may be here."
        raise UserError(
            f"{full} No file was left half-written. {ROOM[error.errno]} and run `dvc repro` again: it continues."
        ) from None


@contextlib.contextmanager
def explain_os_errors() -> Iterator[None]:
    """Raise errors of the file system (a full disk, missing rights, a file in place of a folder) as a UserError that names
    the place. Any other OSError is a fault of this program and passes."""
    try:
        yield
    except OSError as error:
        if error.errno not in (*FULL, *REFUSED):
            raise
        place = str(error.filename or "A file that was being written")
        place = place if len(place) <= 300 else f"{place[:300]}..."
        if error.errno in FULL:
            full = "A file would be larger than it may be here" if error.errno == errno.EFBIG else "The disk is full"
            raise UserError(f"{full} ({place}). {ROOM[error.errno]} and run it again.") from None
        raise UserError(
            f"{place}: {error.strerror}. Mend that place (its rights, or what lies there) or give another one, and run it again."
        ) from None


def existing_parent(path: Path) -> Path:
    """Return the path itself or its closest parent that exists."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return path


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a file to fill, and move it to `path` at the end. After an error `path` is as it was."""
    temporary = path.with_name(path.name + ".part")
    with explain_full_disk(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file completely, or leave it as it was."""
    with whole_file(Path(path)) as file:
        file.write(data)


def write_json(path: Path, value) -> None:
    """Write a value as JSON with sorted keys, completely or not at all."""
    write_whole(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def read_json(path: Path, **keys: type) -> dict:
    """Return the JSON object that a stage wrote. Raises UserError for anything but an object with values of these types."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run `dvc repro`, which makes it, or `dvc pull`, which fetches it.") from None
    except (ValueError, RecursionError):  # JSON's and UTF-8's errors are ValueErrors
        entries = None
    if not isinstance(entries, dict) or any(not isinstance(entries.get(key), kind) for key, kind in keys.items()):
        raise damaged(path, f"it is no JSON object with {', '.join(keys)}")
    return entries


def write_checked(path: Path, entries: dict) -> None:
    """Write JSON with its own digest as a further entry."""
    write_json(path, {**entries, "digest": json_digest(entries)})


def read_checked(path: Path, **keys: type) -> dict:
    """Return the entries that write_checked wrote. Raises UserError as read_json does, and where the digest is another."""
    entries = read_json(path, **keys)
    if entries.pop("digest", None) != json_digest(entries):
        raise damaged(path, OTHER_DIGEST)
    return entries


def damaged(path: Path, fault: str) -> UserError:
    """Return the error for a damaged file in a stage's out.

    DVC's cache, wherever it lies, may hold the same bytes, linked or copied: deleting the out alone would bring them back."""
    file, folder = shlex.quote(str(path)), shlex.quote(str(Path(path).parent))
    size = Path(path).stat().st_size if Path(path).exists() else 0
    return UserError(
        f"{path} is damaged: {fault}. Delete it and its twin in DVC's cache "
        f"(`find \"$(dvc cache dir)\" -type f -size {size}c -exec cmp -s {{}} {file} ';' -delete; rm -r {folder}`) "
        "and run `dvc repro` again, which makes what the cache lacks."
    )


def damaged_source(path: Path, fault: str) -> UserError:
    """Return the error for a damaged file that the recipe names, which no stage can make again."""
    return UserError(
        f"{path} is damaged: {fault}. Fetch or copy it again (`git checkout -- {shlex.quote(str(path))}` restores a file that git "
        "keeps)."
    )


@contextlib.contextmanager
def whole_folder(target: Path, digest: str) -> Iterator[Path]:
    """Yield a folder to fill, and move it to `target` at the end in one step.

    It still holds the files of an interrupted run with the same digest, to be continued. Raises UserError before any work
    where `target` cannot be a folder."""
    if target.name in ("", "..") or target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UserError(
            f"{target} cannot be replaced by a folder of results: give the path of a folder of its own, or remove it."
        )
    folder = target.with_name(f".{target.name}.part-{digest}")
    for other in target.parent.glob(f".{target.name}.part-*"):
        if other != folder:
            shutil.rmtree(other)
    with explain_full_disk(target):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            yield folder
        except BaseException:
            with contextlib.suppress(OSError):
                folder.rmdir()  # if it is empty: files in it can be continued
            raise
        if target.exists():
            shutil.rmtree(target)
        os.replace(folder, target)
