"""Work over processes: in order, bounded, interruptible."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from milan.core.errors import Preempted, UserError
from milan.core.parallel import AHEAD, interrupts_held, ordered
from tests.conftest import ROOT, forked


def slow_when_even(job: int) -> int:
    time.sleep(0.02 * (job % 2 == 0))
    return job * job


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_results_come_in_the_order_of_the_jobs(processes, one_thread):
    assert list(ordered(slow_when_even, range(30), processes)) == [job * job for job in range(30)]


def test_jobs_are_taken_as_results_are_used(one_thread):
    """So that a million images never wait in memory."""
    taken = []

    def jobs():
        for job in range(1000):
            taken.append(job)
            yield job

    results = ordered(slow_when_even, jobs(), 2)
    assert [next(results), next(results)] == [0, 1]
    assert len(taken) <= 2 + 2 * AHEAD + 1
    results.close()


def test_an_interrupt_is_put_off_and_not_lost():
    began = []
    with pytest.raises(KeyboardInterrupt), interrupts_held():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        began.append("forked")
    assert began == ["forked"]


def test_a_failing_job_says_why_and_ends_the_rest(one_thread):
    with pytest.raises(ZeroDivisionError):
        list(ordered(reciprocal, range(3, -1000, -1), 2))


def reciprocal(job: int) -> float:
    return 1 / job


def die_or_sleep(death: int) -> None:
    os.kill(os.getpid(), death) if death else time.sleep(30)


def lose_a_worker(death: int) -> None:
    """As a stage does it, whose handler of SIGTERM the workers inherit."""

    def preempt(*_):
        raise Preempted

    signal.signal(signal.SIGTERM, preempt)
    with pytest.raises(UserError, match="A worker process was killed.*Run again: it continues"):
        list(ordered(die_or_sleep, [0, 0, death, 0, 0, 0], 3))


@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_worker_is_said_and_the_rest_end_at_once(death, one_thread):
    assert forked(lose_a_worker, death) == 0


def test_no_worker_outlives_a_killed_parent(tmp_path):
    """Which would wait for work for ever."""
    code = (
        "import os, pathlib, time\n"
        "from milan.core.parallel import ordered\n"
        "def write(job):\n"
        f"    (pathlib.Path({str(tmp_path)!r}) / str(os.getpid())).touch()\n"
        "    time.sleep(0.1)\n"
        "list(ordered(write, range(10_000), 2))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)})
    wait_for(lambda: len(list(tmp_path.iterdir())) == 2)
    parent.kill()
    parent.wait()
    wait_for(lambda: not any(psutil.pid_exists(int(path.name)) for path in tmp_path.iterdir()))


def wait_for(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
