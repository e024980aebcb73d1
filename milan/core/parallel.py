"""Parallel work in processes: results in order, few of them in memory, no lost Ctrl-C and no orphans."""

import contextlib
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from milan.core.errors import UserError
from milan.core.program import end_with_workers

AHEAD = 4  # jobs of each process that may be finished before their turn


def ordered(function: Callable, jobs: Iterable, processes: int) -> Iterator:
    """Yield function(job) of each job, in the order of the jobs, computed by several processes (1: by this one). Raises
    UserError when one of them is killed."""
    if processes == 1:
        yield from map(function, jobs)
        return
    waiting, pool = deque(), ProcessPoolExecutor(processes, initializer=end_with, initargs=(os.getpid(),))
    try:
        for job in jobs:
            with interrupts_held():
                waiting.append(pool.submit(function, job))
            if len(waiting) > AHEAD * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError("A worker process was killed, perhaps for want of memory. Run again: it continues.") from None
    finally:
        pool.shutdown(cancel_futures=True)  # after a failure the waiting jobs are not needed


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Delay Ctrl-C while processes are forked: Python swallows it inside fork's own hooks, and half a pool would outlive its
    parent. The children keep this handler; their parent ends them.

    It is a handler and no signal mask because the system may deliver the signal to any thread, such as a library's own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught = []
    before = signal.signal(signal.SIGINT, lambda *signal_and_frame: caught.append(signal_and_frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if caught and callable(before):
            before(*caught[0])


def end_with(parent: int) -> None:
    """End this process, and its own workers, when its parent is gone (kill -9 reaches only one process), and on SIGTERM.

    The SIGTERM handler that it inherits from a stage would only fail the current job, and a pool would wait for ever."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        end_with_workers(1)

    threading.Thread(target=watch, daemon=True).start()
