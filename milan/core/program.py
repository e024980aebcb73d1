"""What every program of the project does alike: one process at a time for a task, errors as one paragraph,
a quick start, and a quick end without orphans."""

import atexit
import contextlib
import gc
import multiprocessing
import os
import re
import signal
import sys
import textwrap
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from milan.core.errors import UserError
from milan.core.files import SCRATCH
from milan.core.locks import lock


@contextlib.contextmanager
def alone(title: str) -> Iterator[int]:
    """One process a stage and variation: another one (a second `dvc repro`, a run whose terminal died) is waited for. Yields
    the lock's file number, for a child to hold it too."""
    SCRATCH.mkdir(exist_ok=True)
    path = SCRATCH / f"{title.replace(' ', '-')}.lock"
    held = lock(path, wait=False)
    if held is None:
        print(f"{title} is already being run by another process; waiting for it to end.", file=sys.stderr, flush=True)
        held = lock(path)
    try:
        yield held
    finally:
        os.close(held)


def fail(text: str, status: int = 1) -> None:
    """Print an error as a paragraph, in which no line breaks a `command`, and exit."""
    text = re.sub("`[^`]*`", lambda command: command[0].replace(" ", "\0"), f"error: {text}")
    paragraph = textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False).replace("\0", " ")
    print(f"\n{paragraph}", file=sys.stderr)
    sys.exit(status)


@contextlib.contextmanager
def workers_ended() -> Iterator[None]:
    """After an error, end the processes that multiprocessing started here, so that nothing keeps this one from ending.

    The interpreter's exit would wait for ever for loader workers, which ignore SIGTERM (milan/training/loop.py). They end by
    themselves with their loader, which the frames of the error hold; those that do not are killed."""
    try:
        yield
    except BaseException as error:
        link = error
        while link:
            traceback.clear_frames(link.__traceback__)
            link = link.__context__
        kill_workers()
        raise


def kill_workers() -> None:
    """Kill the processes that multiprocessing started here."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise for them
    for child in multiprocessing.active_children():
        child.kill()


SHORTAGES = {  # pattern of an error's text: what is short, and how to mend it
    r"CUDA out of memory|CUDA error: out of memory|_STATUS_ALLOC_FAILED": (
        "The GPU's memory is full. {lower}`nvidia-smi` lists the programs that use it."
    ),
    r"/dev/shm|out of shared memory|</torch_.*(No space left|Cannot allocate)|No space left.* in synchronize.py": (
        "The shared memory of this machine (/dev/shm) is full; loader workers pass images through it. Enlarge it (docker run: "
        "`--shm-size=8g` or `--ipc=host`), or lower runtime.workers, to 0 for none: that changes no result."
    ),
    r"an't allocate memory|Cannot allocate memory|MemoryError|DataLoader worker.*(signal: Killed|exited unexpectedly)": (
        "The memory of this machine is full. {lower}Fewer loader workers (runtime.workers) and other programs leave more of it."
    ),
    r"Too many open files|items of ancdata": (
        "This process may not open more files. Raise the limit (`ulimit -n 65536`), or lower runtime.workers."
    ),
}


@contextlib.contextmanager
def explain_shortage(lower: str) -> Iterator[None]:
    """Raise an error that says that memory of some kind, or files, are short as a UserError. It is known by its text: torch
    raises RuntimeErrors, and the error of another process is text.

    lower: the setting that says how many images are computed at a time, with its value; "" where there is none."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        place = Path(traceback.extract_tb(error.__traceback__)[-1].filename).name  # a semaphore that fails tells no more
        said = f"{type(error).__name__}: {error} in {place}"
        for pattern, advice in SHORTAGES.items():
            if cause := re.search(f".*({pattern}).*", said):
                kept = f"What was saved is kept; run it again and it continues. ({cause[0].strip()[:200]})"
                raise UserError(f"{advice.format(lower=f'Lower {lower}. ' if lower else '')} {kept}") from None
        raise


def loaded() -> None:
    """Collect garbage from here on (stages/__init__.py disables it), but not among what the libraries made while they loaded."""
    gc.freeze()
    gc.enable()
    atexit.register(gc.unfreeze)  # triton reports what is still there at the end as leaks


def end_with_workers(status: int) -> NoReturn:
    """End this process and those that multiprocessing started here, from any thread, and tidy nothing up, which could wait for
    processes that are gone."""
    kill_workers()
    os._exit(status)


def end_at_once() -> NoReturn:
    """End this process with status 0 and without Python's own teardown, which takes a second where torch is loaded."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
