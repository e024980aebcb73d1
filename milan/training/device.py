"""The device, threads and numeric precision of a process."""

import os
import warnings

import torch
from timm.layers import set_fused_attn

from milan.core.errors import UserError
from milan.params import Compute

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def resolve_device(compute: Compute) -> torch.device:
    """Return the device of this process: cuda:LOCAL_RANK or cpu. Raises UserError where compute.device is cuda without a GPU."""
    kind = compute.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError("compute.device is cuda, but torch sees no GPU here. Use `-S compute.device=auto` or check the driver.")
    return torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device("cpu")


def resolve_precision(compute: Compute, device: torch.device) -> str:
    """Return "fp32", "bf16" or "fp16". `auto` is bf16 where the hardware computes in it, else fp16 on a GPU and fp32 on a CPU."""
    if compute.precision != "auto":
        return compute.precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    capable = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return "bf16" if capable else "fp32"


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Return the context in which a model computes in this precision; it does nothing for fp32."""
    return torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32")


def set_up(compute: Compute) -> torch.device:
    """Set threads, determinism and device of this process and return the device. Every process calls it first."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch|open_clip")
    torch.set_num_threads(compute.threads)
    device = resolve_device(compute)
    choose_attention(resolve_precision(compute, device), device)
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
