"""Thin words over torch.distributed: one function, in one process or in many (torchrun's own launcher)."""

import contextlib
import json
import logging
import os
import signal
import socket
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from timm.layers import set_fused_attn

from milan.errors import UserError
from milan.params import Compute
from milan.workers import end_with

PREEMPTED = 75  # exit status EX_TEMPFAIL: stopped by a signal, saved, run again to continue
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def resolve_device(compute: Compute) -> torch.device:
    """The device of this process: cuda:<local rank> or cpu."""
    kind = compute.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError("compute.device is cuda, but torch sees no GPU here. Use `-S compute.device=auto` or check the driver.")
    return torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device("cpu")


def resolve_precision(compute: Compute, device: torch.device) -> str:
    """fp32, bf16 or fp16; auto takes bf16 where the hardware computes in it."""
    if compute.precision != "auto":
        return compute.precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    capable = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return "bf16" if capable else "fp32"


def autocast(precision: str, device: torch.device):
    return torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32")


def set_up(compute: Compute) -> torch.device:
    """Threads, determinism and device of this process; called at the start of every process."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch|open_clip")
    torch.set_num_threads(compute.threads)
    device = resolve_device(compute)
    choose_attention(resolve_precision(compute, device), device)
    if compute.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    return device


def choose_attention(precision: str, device: torch.device) -> None:
    """Whether models built from here on use torch's fused attention (timm's switch, which our decoder follows): on a
    CPU its backward pass in bf16 takes three to nine times as long as the products written out (benchmarks/step.py)."""
    set_fused_attn(not (device.type == "cpu" and precision == "bf16"))


def launch(function: Callable[..., dict], compute: Compute, *arguments) -> dict:
    """Run function(*arguments) in compute.processes processes on this node (times compute.nodes); the value
    returned by rank 0. A UserError in any process is raised here; the others are stopped."""
    if compute.processes * compute.nodes == 1:
        return function(*arguments)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        config = LaunchConfig(
            min_nodes=compute.nodes,
            max_nodes=compute.nodes,
            nproc_per_node=compute.processes,
            run_id=os.environ.get("SLURM_JOB_ID", "milan"),
            monitor_interval=0.2,
            max_restarts=0,
            **meeting(compute.nodes),
        )
        try:
            with handlers_restored():
                results = elastic_launch(config, in_process)(folder, function, compute, arguments)
        except SignalException:
            raise SystemExit(PREEMPTED) from None
        except Exception as error:
            raise failure_of(Path(folder), error) from None
    return next(iter(results.values())) if 0 not in results else results[0]


def meeting(nodes: int) -> dict:
    """How processes find each other and how they start. Forking spares each the seconds of importing torch; neither CUDA
    nor the threads of a rendezvous between nodes survive it (a lock that such a thread holds stays shut in the child)."""
    if nodes > 1:
        endpoint = os.environ.get("MILAN_RENDEZVOUS", "localhost:0")
        return {"rdzv_backend": "c10d", "rdzv_endpoint": endpoint, "start_method": "spawn"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    start = "spawn" if torch.cuda.is_available() else "fork"
    return {"rdzv_backend": "static", "rdzv_endpoint": endpoint, "rdzv_configs": {"rank": 0}, "start_method": start}


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


def in_process(folder: str, function: Callable[..., dict], compute: Compute, arguments: tuple) -> dict:
    """One process of a launch: joins the group, runs, and leaves word of its failure."""
    device = resolve_device(compute)
    end_with(os.getppid())
    try:
        # On one node through a file, not through the launcher: a connection that comes in while it forks another process
        # can leave a lock of the C library shut in that one for ever.
        where = "env://" if compute.nodes > 1 else f"file://{folder}/meeting"
        rank_and_size = {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", init_method=where, **rank_and_size)
        return function(*arguments)
    except BaseException as error:
        kind = kind_of(error)
        text = traceback.format_exc() if kind == "crash" else str(error)
        Path(folder, f"{kind}-{os.environ['RANK']}.json").write_text(json.dumps(text))
        raise SystemExit(1) from None
    finally:
        with contextlib.suppress(Exception):
            dist.destroy_process_group()


def kind_of(error: BaseException) -> str:
    """user: to be said as it is; lost: the end of another process, as this one sees it; crash: a fault of this program."""
    if isinstance(error, UserError):
        return "user"
    return "lost" if isinstance(error, dist.DistError) or "/gloo/" in str(error) else "crash"


def failure_of(folder: Path, error: Exception) -> Exception:
    """The most telling failure that the processes left behind."""
    for kind, wrap in (("user", UserError), ("crash", RuntimeError)):
        for path in sorted(folder.glob(f"{kind}-*.json")):
            return wrap(json.loads(path.read_text()))
    seen = [json.loads(path.read_text())[:150] for path in sorted(folder.glob("lost-*.json"))]
    return UserError(
        f"A training process was lost ({seen[0] if seen else type(error).__name__}): it may have been killed, for "
        "instance for want of memory. What was saved is kept; run `dvc repro` again and it continues."
    )


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


def share_buffers(model: torch.nn.Module) -> None:
    """Give every process rank 0's buffers (a batch norm's running statistics)."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
