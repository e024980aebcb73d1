"""Process groups: a stage's function in one process, or in many that share every batch.

On one machine the stage starts the processes by torch.distributed.elastic. On several machines torchrun starts the stage's
command on each (docs/cluster.md): then rank 0 is the stage, and the other ranks run only the function that it launches.
"""

import contextlib
import ctypes
import datetime
import functools
import importlib
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from milan.core.errors import Preempted, UserError
from milan.core.parallel import end_with
from milan.core.program import end_at_once, end_with_workers, fail, loaded
from milan.params import Compute, Params
from milan.training.device import resolve_device
from milan.training.failures import FAILURE, HERE, LostProcess, end, first_failure, leave_word

PR_SET_PDEATHSIG = 1  # prctl(2): the signal that a process gets when its parent dies
STOP_SECONDS = 300  # between the signal that asks a process to save and end, and the one that ends it
FAIL_SECONDS = 5  # between the first word of a failure and the end of the processes that do not hear of it
CONNECT_WAIT = datetime.timedelta(minutes=1)  # for torchrun's store, which is there before its processes
START_WAIT = datetime.timedelta(minutes=10)  # for the slowest rank to start
LAUNCH_WAIT = datetime.timedelta(days=1)  # for rank 0's launch; it ends when rank 0 ends without one
CALL = "milan/call"  # key of the store: the function that rank 0 launches


def rank() -> int:
    """Return this process's number in the group, 0 outside one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes of the group, 1 outside one."""
    return dist.get_world_size() if dist.is_initialized() else 1


# Starting a function in many processes.


def launch(function: Callable[..., dict], params: Params, *arguments) -> dict:
    """Run function(params, *arguments) in every process and return rank 0's value. A stage launches once.

    Raises the first failure of any process, after the others are stopped: a UserError as it is, a fault of this program as a
    RuntimeError with its traceback, a lost process as a UserError, and Preempted after a signal."""
    if started_by_torchrun():
        return launch_from_rank_0(function, params, arguments)
    if params.world_size == 1:
        return function(params, *arguments)
    return launch_here(function, params, arguments)


def launch_here(function: Callable[..., dict], params: Params, arguments: tuple) -> dict:
    """Run the function in runtime.processes processes of this machine."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("torch.distributed.elastic", "torch.distributed.elastic.agent.server.api"):  # which has a level of its own
        logging.getLogger(name).setLevel(logging.CRITICAL)
    processes = params.runtime.processes
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id="milan",
        monitor_interval=0.2,
        max_restarts=0,
        shutdown_timeout=STOP_SECONDS,
        rdzv_backend="static",
        rdzv_endpoint="127.0.0.1:0",
        rdzv_configs={"rank": 0},
        # Forking spares each process the seconds of importing torch; CUDA does not survive it.
        start_method="spawn" if torch.cuda.is_available() else "fork",
    )
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "store"))
        try:
            with handlers_restored():
                return elastic_launch(config, run_here)(path, function, params, arguments)[0]
        except SignalException:
            raise Preempted from None
        except Exception as error:
            raise first_failure(dist.FileStore(path, processes), error) from None


@contextlib.contextmanager
def handlers_restored() -> Iterator[None]:
    """Restore the handlers of the signals that end a process: elastic's launcher replaces them."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = [signal.getsignal(number) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def run_here(path: str, function: Callable[..., dict], params: Params, arguments: tuple) -> dict:
    """Run the function in a process that launch_here started.

    The store is a file and not elastic's own: a connection that reaches the launcher while it forks another process can
    leave a lock of the C library shut in that process for ever."""
    end_by_signals()
    end_with(os.getppid())
    with contextlib.suppress(AttributeError):  # of Linux; torch asks for SIGINT, which in training would mean: save and end
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    store = dist.FileStore(path, params.runtime.processes)
    threading.Thread(target=end_after_failure, args=[store], daemon=True).start()
    try:
        kind = resolve_device(params.compute).type
        check_devices(kind, params.compute)
        join(store, kind)
        value = function(params, *arguments)
        leave()
        return value
    except BaseException as error:
        leave_word(store, error)
        end(error)


def end_after_failure(store: dist.Store) -> None:
    """End this process and its workers soon after any process left word of its failure. It may wait for that process inside a collective
    operation, where it hears no signal, and the launcher would grant it STOP_SECONDS."""
    while not store.check([FAILURE]):
        time.sleep(0.5)
    time.sleep(FAIL_SECONDS)
    end_with_workers(1)


def end_by_signals() -> None:
    """Let signals end this process at once. Training (milan/training/loop.py) has handlers of its own, which save first."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


# Ranks that torchrun started.


def started_by_torchrun() -> bool:
    """Return whether torchrun started this process as one of several. (A Kubernetes operator sets RANK, too, but no LOCAL_RANK.)"""
    return "LOCAL_RANK" in os.environ and int(os.environ["WORLD_SIZE"]) > 1


@contextlib.contextmanager
def torchrun() -> Iterator[None]:
    """Surround a stage that may launch, and end its process when it has ended well. Of the ranks that torchrun started only 0
    enters; the others run the function that it launches, if it launches one, and end with status 0."""
    if not started_by_torchrun():
        yield
        end_at_once()
    end_with(os.getppid())
    if os.environ["RANK"] != "0":
        loaded()
        take_part()
        end_at_once()
    try:
        yield
    finally:
        with contextlib.suppress(dist.DistError):  # the store is gone with the node that held it
            torchrun_store().set(CALL, b"")
    end_at_once()


@functools.cache
def torchrun_store() -> dist.Store:
    """Connect to the store of torchrun, at MASTER_ADDR and MASTER_PORT. Ends this process where it is gone."""
    try:
        store = next(dist.rendezvous("env://", timeout=CONNECT_WAIT))[0]
    except dist.DistError as error:
        fail(f"The node of rank 0 has ended, or cannot be reached: {str(error)[:150]}")
    store.set_timeout(START_WAIT)
    return store


def launch_from_rank_0(function: Callable[..., dict], params: Params, arguments: tuple) -> dict:
    """Run the function here, and call the other ranks to run it too."""
    store, kind = torchrun_store(), resolve_device(params.compute).type
    module = sys.modules["__main__"].__spec__.name if function.__module__ == "__main__" else function.__module__
    store.set(CALL, json.dumps([module, function.__name__, kind, asdict(params.compute)]))
    try:
        check_devices(kind, params.compute)
        meet(store)
        join(store, kind)
        from_rank_0((params, arguments))
        value = function(params, *arguments)
        leave()
        return value
    except BaseException as error:
        leave_word(store, error)
        raise first_failure(store, error) from None


def take_part() -> None:
    """Run the function that rank 0 launches. A failure ends this process; rank 0 says it, or, where rank 0 cannot, the first
    process of this node."""
    end_by_signals()
    store = torchrun_store()
    try:
        store.wait([CALL], LAUNCH_WAIT)
        if call := store.get(CALL):
            module, name, kind, compute = json.loads(call)
            check_devices(kind, Compute(**compute))
            meet(store)
            join(store, kind)
            params, arguments = from_rank_0(None)
            getattr(importlib.import_module(module), name)(params, *arguments)
            leave()
    except BaseException as error:
        leave_word(store, error)
        failure = first_failure(store, error)
        if isinstance(failure, LostProcess) and os.environ["LOCAL_RANK"] == "0" != os.environ["GROUP_RANK"]:
            with contextlib.suppress(SystemExit):
                fail(str(failure))
        end(error)


def meet(store: dist.Store) -> None:
    """Wait until all ranks are here. Torch's own joining would wait half an hour for one that has failed before it."""
    store.set(HERE + os.environ["RANK"], b"")
    ranks = range(int(os.environ["WORLD_SIZE"]))
    try:
        store.wait([f"{HERE}{rank}" for rank in ranks], START_WAIT)
    except dist.DistStoreError:
        missing = [str(rank) for rank in ranks if not store.check([f"{HERE}{rank}"])]
        raise UserError(
            f"Of ranks 0 to {ranks[-1]}, these did not start within {START_WAIT.seconds} s: {', '.join(missing)}. The logs of their "
            "nodes say why."
        ) from None
    if store.check([FAILURE]):
        raise LostProcess("a process failed before it joined the others")


# Joining and leaving.


def check_devices(kind: str, compute: Compute) -> None:
    """Raise UserError unless this machine computes on the kind of device of rank 0 (cuda or cpu), which it does not without its
    driver, and has a GPU for each of its processes."""
    here, processes, gpus = resolve_device(compute).type, int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if here != kind:
        raise UserError(
            f"Rank 0 computes on {kind}, and {socket.gethostname()} on {here}: mend its driver, or set compute.device."
        )
    if kind == "cuda" and processes > gpus:
        raise UserError(
            f"{processes} processes were started on {socket.gethostname()}, which has {gpus} GPU(s): set runtime.processes (under "
            "torchrun, --nproc-per-node) to the number of GPUs of a node (a run continues with another number)."
        )


def join(store: dist.Store, kind: str) -> None:
    """Make this process one of the group. kind: cuda or cpu, alike in all processes."""
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo", store=store, rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"])
    )


def leave() -> None:
    """Leave the group."""
    with contextlib.suppress(Exception):
        dist.destroy_process_group()


# Collective operations; in a single process they return what they are given.


def from_rank_0(value):
    """Return rank 0's value in every process."""
    if dist.is_initialized():
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]
    return value


def mean(value: torch.Tensor) -> torch.Tensor:
    """Return the mean over processes."""
    if dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
        value /= world_size()
    return value


def total(value: torch.Tensor) -> torch.Tensor:
    """Return the sum over processes."""
    if dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
    return value


def barrier() -> None:
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.barrier()
