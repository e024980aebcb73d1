"""Files that are written whole or not at all, and digests of what a result was made from."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from milan.core.errors import UserError

OTHER_DIGEST = "the digest is not the one that it was written with"
FULL = (errno.ENOSPC, errno.EDQUOT)
REFUSED = (  # by the file system, for what the user can mend
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
    """16 hex digits of anything JSON can say (dataclasses are spelled by repr)."""
    text = json.dumps(parts, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def dvc_hash(path: Path, limit: int = 2 << 30) -> str | None:
    """What DVC calls the content of a file (its MD5) or a folder (the MD5 of its listing, and ".dir"), so that a run
    can be found from dvc.lock and back. None above `limit` bytes: there, DVC's own hashing is slow enough once."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    if sum(file.stat().st_size for file in files) > limit:
        return None
    if path.is_file():
        return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    listing = [{"md5": dvc_hash(file), "relpath": file.relative_to(path).as_posix()} for file in files]
    listing.sort(key=lambda entry: entry["relpath"])
    return hashlib.md5(json.dumps(listing, sort_keys=True).encode(), usedforsecurity=False).hexdigest() + ".dir"


@contextlib.contextmanager
def full_disk_said(path: Path) -> Iterator[None]:
    """Turn "no space left" into an error that names the place."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            free = shutil.disk_usage(existing_parent(path)).free
            raise UserError(
                f"The disk that holds {path} is full ({free / 1e6:.1f} MB free). No file was left half-written. "
                "Free some space (`dvc gc -w` drops unused results) and run `dvc repro` again: it continues."
            ) from None
        raise


@contextlib.contextmanager
def refusals_said() -> Iterator[None]:
    """Turn what the file system refuses (a full disk, a missing right, a file where a folder belongs) into an error that
    names the place; any other OSError is a fault of this program, and passes."""
    try:
        yield
    except OSError as error:
        if error.errno not in (*FULL, *REFUSED):
            raise
        place = str(error.filename or "A file that was being written")
        place = place if len(place) <= 300 else f"{place[:300]}..."
        if error.errno in FULL:
            raise UserError(f"The disk is full ({place}). Free some space (`dvc gc -w`) and run it again.") from None
        raise UserError(
            f"{place}: {error.strerror}. Mend that place (its rights, or what lies there) or give another one, and run it again."
        ) from None


def existing_parent(path: Path) -> Path:
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return path


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to fill that stands under path once it is whole; after an error path is as it was."""
    temporary = path.with_name(path.name + ".part")
    with full_disk_said(path):
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
    """Write data under path, or leave path as it was."""
    with whole_file(Path(path)) as file:
        file.write(data)


def write_json(path: Path, value) -> None:
    write_whole(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def read_json(path: Path, **keys: type) -> dict:
    """The object in a file that a stage wrote. Raises UserError for anything but an object with values of these types."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run `dvc repro`, which makes it, or `dvc pull`, which fetches it.") from None
    except (ValueError, RecursionError):  # JSON's and UTF-8's errors are ValueErrors
        found = None
    if not isinstance(found, dict) or any(not isinstance(found.get(key), kind) for key, kind in keys.items()):
        raise damaged(path, f"it is no JSON object with {', '.join(keys)}")
    return found


def write_checked(path: Path, entries: dict) -> None:
    """JSON that carries its own digest."""
    write_json(path, {**entries, "digest": json_digest(entries)})


def read_checked(path: Path, **keys: type) -> dict:
    """What write_checked was given. Raises UserError, as read_json does, and when a byte has changed since."""
    found = read_json(path, **keys)
    if found.pop("digest", None) != json_digest(found):
        raise damaged(path, OTHER_DIGEST)
    return found


def damaged(path: Path, fault: str) -> UserError:
    """For a file in a stage's out. Where DVC links (.dvc/config), its cache holds the very same file, and deleting the out
    alone would bring it back."""
    return UserError(
        f"{path} is damaged: {fault}. Delete it and its twin in DVC's cache (`find .dvc/cache -samefile {path} -delete; "
        f"rm -r {Path(path).parent}`) and run `dvc repro` again, which makes what the cache lacks."
    )


@contextlib.contextmanager
def whole_folder(target: Path, digest: str) -> Iterator[Path]:
    """A folder to fill that becomes `target` in one step at the end. What an interrupted run with the same
    digest left in it is still there, to be continued. Raises UserError, before any work, where no folder can be."""
    if target.name in ("", "..") or target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UserError(
            f"{target} cannot be replaced by a folder of results: give the path of a folder of its own, or remove it."
        )
    folder = target.with_name(f".{target.name}.part-{digest}")
    for other in target.parent.glob(f".{target.name}.part-*"):
        if other != folder:
            shutil.rmtree(other)
    with full_disk_said(target):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            yield folder
        except BaseException:
            with contextlib.suppress(OSError):
                folder.rmdir()  # unless something is there to be continued
            raise
        if target.exists():
            shutil.rmtree(target)
        os.replace(folder, target)
