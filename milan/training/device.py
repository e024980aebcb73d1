"""The device, threads and numeric precision of a process."""

import math
import os
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import torch
from timm.layers import set_fused_attn
from timm.models.vision_transformer import Block

from milan.core.errors import UserError
from milan.core.files import SCRATCH, read_json, write_json
from milan.core.parallel import end_with
from milan.params import Compute, Model, Params
from milan.tracking.machine import cpu_name
from milan.tracking.tracker import Tracker

CANDIDATES = ("fp32", "bf16")  # on a CPU
MEASURED = SCRATCH / "precision.json"  # {case: {precision: seconds of a block}}
ROUNDS, TOKENS = 5, 256  # of that measurement: a second at ViT-B/16's size, less at smaller ones
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def resolve_device(compute: Compute) -> torch.device:
    """Return the device of this process: cuda:LOCAL_RANK or cpu. Raises UserError where compute.device is cuda without a GPU."""
    kind = compute.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError("compute.device is cuda, but torch sees no GPU here. Use `-S compute.device=auto` or check the driver.")
    return torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device("cpu")


def resolve_compute(compute: Compute, model: Model) -> Compute:
    """Return the section with precision `auto` replaced by fp32, bf16 or fp16: on a GPU bf16 where it computes in it, else fp16;
    on a CPU the faster of fp32 and bf16."""
    if compute.precision != "auto":
        return compute
    if resolve_device(compute).type == "cuda":
        return replace(compute, precision="bf16" if torch.cuda.is_bf16_supported() else "fp16")
    return replace(compute, precision=faster_precision(compute.threads, model))


def resolve_params(params: Params, tracker: Tracker | None = None) -> Params:
    """Return the recipe with its precision resolved, and log device and precision as tags of the stage's run. A stage does so
    before it launches its processes, so that all compute in the same precision."""
    compute = resolve_compute(params.compute, params.model)
    if tracker:
        tracker.event("tags", values={"device": resolve_device(compute).type, "precision": compute.precision})
    return replace(params, compute=compute)


def faster_precision(threads: int, model: Model) -> str:
    """Return "fp32" or "bf16", whichever this CPU trains a block of the encoder in faster, and say so.

    It is measured once for a CPU, torch, number of threads and size of the encoder, and kept in MEASURED: the stages of a
    pipeline and a continued training agree, even where the two are equally fast."""
    case = f"{cpu_name()}, torch {torch.__version__}, {threads} thread(s), {model.encoder.embed_dim} channels"
    measured = read_json(MEASURED) if MEASURED.exists() else {}
    if case not in measured:
        # In a child: threads that computed here would not survive the fork of the stage's processes (distributed.launch_here).
        with ProcessPoolExecutor(1, get_context("fork"), end_with, (os.getpid(),)) as child:
            measured[case] = child.submit(block_seconds, threads, model).result()
        write_json(MEASURED, measured)
    seconds = measured[case]
    fastest = min(CANDIDATES, key=seconds.get)
    times = " and ".join(f"{1000 * seconds[precision]:.3g} ms in {precision}" for precision in CANDIDATES)
    print(f"precision: {fastest}, because a block of the encoder takes {times} ({case}; kept in {MEASURED})", flush=True)
    return fastest


def block_seconds(threads: int, model: Model) -> dict[str, float]:
    """Return the seconds of the forward and backward pass of one block of the encoder in fp32 and bf16: the shortest of ROUNDS,
    because other programs only lengthen them."""
    torch.set_num_threads(threads)
    size, tokens, cpu = model.encoder, 1 + model.n_patches, torch.device("cpu")
    images = torch.randn(math.ceil(TOKENS / tokens), tokens, size.embed_dim)
    blocks = {}
    for precision in CANDIDATES:
        choose_attention(precision, cpu)
        blocks[precision] = Block(size.embed_dim, size.num_heads, qkv_bias=True)
    seconds = dict.fromkeys(blocks, math.inf)
    for _ in range(ROUNDS):
        for precision, block in blocks.items():
            began = time.perf_counter()
            with autocast(precision, cpu):
                outputs = block(images)
            outputs.sum().backward()
            seconds[precision] = min(seconds[precision], time.perf_counter() - began)
    return seconds


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Return the context in which a model computes in this precision; it does nothing for fp32."""
    return torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32")


def set_up(compute: Compute) -> torch.device:
    """Set threads, determinism and device of this process and return the device. Every process calls it first.

    compute: with its precision resolved."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch|open_clip")
    torch.set_num_threads(compute.threads)
    device = resolve_device(compute)
    choose_attention(compute.precision, device)
    if compute.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # it costs 5 % of a small model's step; no kernel reads it
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    return device


def choose_attention(precision: str, device: torch.device) -> None:
    """Set whether models built from here on use torch's fused attention (timm's switch; our decoder follows it).

    It is off on a CPU in bf16: there the fused backward pass takes three to nine times as long as the written-out products
    (benchmarks/step.py)."""
    set_fused_attn(not (device.type == "cpu" and precision == "bf16"))
