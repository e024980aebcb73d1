"""Locks between processes, by the system's flock."""

import contextlib
import errno
import fcntl
import os
import stat
import tempfile
from pathlib import Path

from milan.core.errors import UserError
from milan.core.files import json_digest

UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


def lock(path: Path, *, shared: bool = False, wait: bool = True) -> int | None:
    """Lock a file, which is created where it is missing. Return the open file's number, whose closing unlocks it, or without
    wait None where another process has locked it.

    On a file system without locks (some Lustre and NFS) a twin of the file in this machine's temporary folder is locked
    instead, which other machines do not see. Raises UserError where that place is not this user's alone."""
    kind = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    try:
        return locked(path, kind)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    return locked(folder_of_twins() / json_digest(os.path.realpath(path)), kind)


def folder_of_twins() -> Path:
    """Return a folder in this machine's temporary one where nobody else can put files or links. Raises UserError where another
    user made it first."""
    folder = Path(tempfile.gettempdir(), f"milan-locks-{os.getuid()}")
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise UserError(
            f"{folder} must be a folder that belongs to you (user {os.getuid()}) and that only you can open (mode 0700): locks lie "
            "in it, since the project's file system has none. Remove it, or set TMPDIR to a folder of your own."
        )
    return folder


def locked(path: Path, kind: int) -> int | None:
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(descriptor, kind)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            return None
        raise
    return descriptor
