"""Describe the machine's hardware without its name or address."""

import os
import platform
from collections import Counter
from pathlib import Path

import psutil


def hardware(device: str = "auto") -> str:
    """Return `Intel Xeon Platinum 8581C, 2 cores, 16 GB of memory; 8 × NVIDIA A100`: the cores and GPUs this process may use.

    device: compute.device of the recipe; with "cpu", GPUs are left out."""
    words = [f"{cpu_name()}, {cores()} cores, {psutil.virtual_memory().total / 1e9:.0f} GB of memory"]
    if device != "cpu":
        words += [f"{count} × {name}" for name, count in Counter(gpu_names()).items()]
    return "; ".join(words)


def cores() -> int:
    """Count the processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def gpu_names() -> list[str]:
    """Return the names of NVIDIA GPUs. The driver is asked, because initialising CUDA is slow and takes memory."""
    import pynvml

    try:
        pynvml.nvmlInit()
        names = [pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(i)) for i in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []
    return [name.decode() if isinstance(name, bytes) else name for name in names]
