"""Work spread over processes: results in order, few of them in memory, a Ctrl-C that is never lost, and no orphans."""

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

AHEAD = 4  # jobs a process that may be finished before their turn


def ordered(function: Callable, jobs: Iterable, processes: int) -> Iterator:
    """function(job) of each job, in the order of the jobs, computed by several processes (by this one if it is 1). Raises
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
        pool.shutdown(cancel_futures=True)  # after a failure, what still waits need not be done


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Put off Ctrl-C while processes are forked: inside fork's own hooks Python would swallow it, and half a pool
    would outlive its parent. The children keep this handler, and leave it to their parent to end them.

    A handler and not a signal mask: the system may deliver the signal to any thread, such as a library's own."""
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
    """Make this process end when its parent is gone (kill -9 reaches only one): no orphan works on unseen. A SIGTERM ends
    it as well: the handler of a stage, inherited, would only fail the job at hand, and a pool wait for ever."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
