"""What every program of the project does alike: one process at a time for a task, and errors as one paragraph."""

import contextlib
import fcntl
import sys
import textwrap
from collections.abc import Iterator

from milan.core.files import SCRATCH


@contextlib.contextmanager
def alone(title: str) -> Iterator[int]:
    """One process a stage and variation: another one (a second `dvc repro`, a run whose terminal died) is waited for. Yields
    the lock's file number, for a child to hold it too."""
    SCRATCH.mkdir(exist_ok=True)
    with open(SCRATCH / f"{title.replace(' ', '-')}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{title} is already being run by another process; waiting for it to end.", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


def fail(text: str, status: int = 1) -> None:
    print("\n" + textwrap.fill(f"error: {text}", 100, break_long_words=False, break_on_hyphens=False), file=sys.stderr)
    sys.exit(status)
