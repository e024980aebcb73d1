"""The failure of one process of several, as one paragraph.

A process that fails leaves a word in the store in which the processes met. The first word counts; the end of another
process, as a process sees it, counts only where there is no other word.
"""

import contextlib
import json
import os
import sys
import traceback

import psutil
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from milan.core.errors import PREEMPTED, Preempted, UserError
from milan.core.program import end_with_workers

FAILURE, LOST = "milan/failure", "milan/lost"  # keys of the store: the two kinds of words
HERE = "milan/here/"  # and the beginning of the keys of ranks that need not be waited for: they are here, or have failed


class LostProcess(UserError):
    """Another process ended without a word."""


def kind_of(error: BaseException) -> str:
    """Return "stopped" (by a signal), "user" (a UserError), "lost" (another process ended) or "crash" (a fault of this program)."""
    if isinstance(error, Preempted | KeyboardInterrupt):
        return "lost" if sibling_is_gone() else "stopped"
    if isinstance(error, UserError):
        return "lost" if isinstance(error, LostProcess) else "user"
    return "lost" if isinstance(error, dist.DistError) or "/gloo/" in str(error) else "crash"


def sibling_is_gone() -> bool:
    """Return whether the launcher has seen another of its processes end, and therefore sends SIGTERM to this one. A launcher
    that is asked to stop sends the signal to all before it looks at any."""
    return len(psutil.Process(os.getppid()).children()) < int(os.environ["LOCAL_WORLD_SIZE"])


def leave_word(store: dist.Store, error: BaseException) -> None:
    """Record for all processes why this one fails."""
    kind, text = kind_of(error), str(error)
    if kind == "crash":
        text = traceback.format_exc()
    elif kind == "lost" and isinstance(error, Preempted):
        text = "another process of its node ended"
    with contextlib.suppress(dist.DistError):  # the store is gone with the node that held it
        store.compare_set(LOST if kind == "lost" else FAILURE, "", json.dumps([kind, text]))
        store.set(HERE + os.environ["RANK"], b"")


def first_failure(store: dist.Store, error: BaseException) -> BaseException:
    """Return the failure to raise: the first that any process left word of. error: the failure as this process sees it."""
    kind, text = "lost", type(error).__name__
    with contextlib.suppress(dist.DistError):
        for key in (LOST, FAILURE):
            if store.check([key]):
                kind, text = json.loads(store.get(key))
    if kind == "stopped":
        return Preempted()
    if kind == "user":
        return UserError(text)
    if kind == "crash":
        return RuntimeError(text)
    return LostProcess(
        f"A training process was lost ({text[:150]}): it may have been killed, for instance for want of memory. What was "
        "saved is kept; run `dvc repro` again and it continues."
    )


def end(error: BaseException) -> None:
    """End this process and its workers at once, with a report for its launcher."""
    get_error_handler().record_exception(error)
    sys.stdout.flush(), sys.stderr.flush()
    end_with_workers(PREEMPTED if isinstance(error, Preempted) else 1)
