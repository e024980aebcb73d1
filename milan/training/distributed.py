"""Thin words over torch.distributed: one function, in one process or in many (torchrun's own launcher starts
them on each node; milan/training/nodes.py brings the nodes together)."""

import contextlib
import ctypes
import datetime
import logging
import os
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from milan.core.errors import PREEMPTED, Preempted, UserError
from milan.core.parallel import end_with
from milan.params import Params
from milan.training import nodes
from milan.training.device import resolve_device

PR_SET_PDEATHSIG = 1  # prctl(2): the signal that a process gets when its parent dies
STOP_SECONDS = 300  # between the signal that asks a process to save and end, and the one that ends it


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@dataclass(frozen=True)
class Place:
    """Where this node's processes of one launch run and meet the others."""

    folder: Path  # shared by all processes: words of failures, and on one node the meeting itself
    kind: str  # of device: cuda or cpu
    processes: int  # on each node
    node: int = 0  # 0 is the head, where the stage runs
    nodes: int = 1
    address: str = ""  # of the head, and a free port there; for several nodes
    port: int = 0


def launch(function: Callable[..., dict], p: Params, *arguments) -> dict:
    """function(p, *arguments) in runtime.processes processes on each of runtime.nodes nodes; the value that rank 0, on
    this node, returns. Raises here what went wrong in any process (the others are stopped): a UserError as it is, a lost
    process as a UserError, Preempted after a signal."""
    if p.world == 1:
        return function(p, *arguments)
    kind, runtime = resolve_device(p.compute).type, p.runtime
    if runtime.nodes == 1:
        with tempfile.TemporaryDirectory() as folder:
            return on_this_node(function, (p, *arguments), Place(Path(folder), kind, runtime.processes))
    with nodes.called(function, kind, runtime.processes, runtime.nodes) as call:
        place = Place(call.folder, kind, runtime.processes, 0, runtime.nodes, call.address, call.port)
        return on_this_node(function, (p, *arguments), place)


def on_this_node(function: Callable[..., dict], arguments: tuple | None, place: Place) -> dict:
    """This node's processes of a launch; on other nodes than the head the arguments come from rank 0."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if place.kind == "cuda" and place.processes > torch.cuda.device_count():
        raise UserError(
            f"runtime.processes is {place.processes}, and {socket.gethostname()} has {torch.cuda.device_count()} GPU(s): set it to "
            "the number of GPUs of a node (a run continues with another number)."
        )
    for name in ("torch.distributed.elastic", "torch.distributed.elastic.agent.server.api"):  # which has a level of its own
        logging.getLogger(name).setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=place.processes,
        run_id="milan",
        monitor_interval=0.2,
        max_restarts=0,
        shutdown_timeout=STOP_SECONDS,
        rdzv_backend="static",
        rdzv_endpoint=f"127.0.0.1:{nodes.free_port()}",
        rdzv_configs={"rank": 0},
        # Forking spares each process the seconds of importing torch; CUDA does not survive it.
        start_method="spawn" if torch.cuda.is_available() else "fork",
    )
    try:
        with handlers_restored():
            return elastic_launch(config, in_process)(place, function, arguments)[0]
    except SignalException:
        raise Preempted from None
    except Exception as error:
        raise failure_of(place.folder, error) from None


@contextlib.contextmanager
def handlers_restored() -> Iterator[None]:
    """The launcher takes over the signals that end a process, and keeps them; give them back."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = [signal.getsignal(number) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def in_process(place: Place, function: Callable[..., dict], arguments: tuple | None) -> dict:
    """One process of a launch: joins the group, runs, and leaves word of its failure."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)  # outside training (milan/training/loop.py) there is nothing to save
    end_with(os.getppid())
    with contextlib.suppress(AttributeError):  # of Linux; torch asks for SIGINT, which in training would mean: save and end
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    local = int(os.environ["LOCAL_RANK"])
    rank = place.node * place.processes + local
    watch = nodes.Watch(place.folder, place.node, place.nodes, rank) if place.nodes > 1 and local == 0 else None
    try:
        if watch:
            watch.start()
        join(place, rank, local)
        value = function(*(from_rank_0(arguments) if place.nodes > 1 else arguments))
        with contextlib.suppress(Exception):
            dist.destroy_process_group()
        if watch:
            watch.leave()
        return value
    except BaseException as error:
        kind = kind_of(error)
        nodes.leave_word(place.folder, kind, rank, traceback.format_exc() if kind == "crash" else str(error))
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(PREEMPTED if kind == "stopped" else 1)  # at once: what tidies up may wait for processes that are gone


def join(place: Place, rank: int, local: int) -> None:
    """Make this process one of the group. It meets the others apart from the launcher: a connection that comes in while
    that one forks another process can leave a lock of the C library shut in it for ever."""
    world = place.nodes * place.processes
    if place.kind == "cuda":
        torch.cuda.set_device(local)
    if place.nodes == 1:
        store = dist.FileStore(str(place.folder / "meeting"), world)
    else:
        store = dist.TCPStore(place.address, place.port, world, rank == 0, datetime.timedelta(seconds=nodes.WAIT_SECONDS))
    dist.init_process_group("nccl" if place.kind == "cuda" else "gloo", store=store, rank=rank, world_size=world)


def kind_of(error: BaseException) -> str:
    """stopped: by a signal; user: to be said as it is; lost: the end of another process, as this one sees it; crash: a
    fault of this program."""
    if isinstance(error, Preempted | UserError):
        return "stopped" if isinstance(error, Preempted) else "user"
    return "lost" if isinstance(error, dist.DistError) or "/gloo/" in str(error) else "crash"


def failure_of(folder: Path, error: Exception) -> BaseException:
    """The most telling failure that the processes of all nodes left behind."""
    if nodes.words(folder, "stopped"):
        return Preempted()
    for kind, wrap in (("user", UserError), ("crash", RuntimeError)):
        for word in nodes.words(folder, kind):
            return wrap(word)
    seen = [word[:150] for word in nodes.words(folder, "lost")]
    return UserError(
        f"A training process was lost ({seen[0] if seen else type(error).__name__}): it may have been killed, for "
        "instance for want of memory. What was saved is kept; run `dvc repro` again and it continues."
    )


def from_rank_0(value):
    """Rank 0's value, in every process."""
    if dist.is_initialized():
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]
    return value


def mean(value: torch.Tensor) -> torch.Tensor:
    """Mean over processes."""
    if dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
        value /= world_size()
    return value


def total(value: torch.Tensor) -> torch.Tensor:
    """Sum over processes."""
    if dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
    return value


def barrier() -> None:
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.barrier()
