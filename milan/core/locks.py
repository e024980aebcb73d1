"""Locks between processes, by the system's flock."""

import errno
import fcntl
import os
import tempfile
from pathlib import Path

from milan.core.files import json_digest

UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


def lock(path: Path, *, shared: bool = False, wait: bool = True) -> int | None:
    """Lock a file, which is created where it is missing. Return the open file's number, whose closing unlocks it, or without
    wait None where another process has locked it.

    On a file system without locks (some Lustre and NFS) a twin of the file in this machine's temporary folder is locked
    instead, which other machines do not see."""
    kind = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    try:
        return locked(path, kind)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    twins = Path(tempfile.gettempdir(), f"milan-locks-{os.getuid()}")
    twins.mkdir(mode=0o700, exist_ok=True)
    return locked(twins / json_digest(os.path.realpath(path)), kind)


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
