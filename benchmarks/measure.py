"""Times cases in turn; writes a table and its JSON; names the machine and its two ceilings.

Machines are noisy, so cases are interleaved (every case once, then every case again) and medians are compared;
ratios between cases of one run mean something, seconds of different runs do not.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from milan.core.progress import Progress
from milan.params import Compute, Model, TransformerSize
from milan.tracking.machine import cpu_name
from milan.training.device import resolve_compute

VIT_B = Model("ViT-B/16", 224, 16, TransformerSize(768, 12, 12), TransformerSize(512, 8, 16))
TINY = Model("ViT-tiny/8", 48, 8, TransformerSize(128, 4, 4), TransformerSize(96, 2, 4))
MODELS = {"vit_b16": VIT_B, "tiny": TINY}


def arguments(doc: str, repeats: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=repeats, help="rounds, of which the medians are reported (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of this process (%(default)s)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser


def step_arguments(parser: argparse.ArgumentParser) -> None:
    """For the scripts that look at one kind of step."""
    parser.add_argument("--model", choices=MODELS, default="vit_b16")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto")
    parser.add_argument("--banked", action="store_true", help="without the teacher")
    parser.add_argument("--no-compile", action="store_true", help="eager on a GPU too")


def compute(args: argparse.Namespace) -> Compute:
    """The recipe's compute section for these arguments; compiled on a GPU alone, unless forbidden."""
    compiled = torch.device(args.device).type == "cuda" and not args.no_compile
    return Compute(torch.device(args.device).type, args.threads, args.precision, False, compiled)


def precision(args: argparse.Namespace) -> str:
    return resolve_compute(compute(args), MODELS[args.model]).precision


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turn(
    cases: dict[str, Callable[[], object]], repeats: int, device: torch.device, warm: int = 1, times: int = 1
) -> dict[str, list[float]]:
    """Seconds of each case, `repeats` times, one case after the other in every round. A case runs `times` in a row, and its
    seconds are the mean of these: a GPU's host runs ahead of it in training, and must be let to here."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    progress = Progress("timing (cases)", len(cases) * (warm + repeats))
    for round_number in range(warm + repeats):
        for name, case in cases.items():
            wait(device)
            began = time.perf_counter()
            for _ in range(times if round_number >= warm else 1):
                case()
            wait(device)
            if round_number >= warm:
                seconds[name].append((time.perf_counter() - began) / times)
            progress.update()
    progress.close()
    return seconds


def median(values: list[float]) -> float:
    return statistics.median(values)


def spread(values: list[float]) -> float:
    """Half the range, in % of the median."""
    return 50 * (max(values) - min(values)) / statistics.median(values)


def machine(device: torch.device) -> dict:
    """Hardware and versions, in words."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version()}


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of one large square product: the most that this device gives to any program."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    seconds = in_turn({"matmul": lambda: a @ b}, 5, device)["matmul"]
    return 2 * n**3 / min(seconds) / 1e12


def copy_peak(device: torch.device) -> float:
    """GB/s of one large copy, bytes read and bytes written: the most that this device's memory gives to any program."""
    size = 2**31 if device.type == "cuda" else 2**26
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    seconds = in_turn({"copy": lambda: target.copy_(source)}, 5, device)["copy"]
    return 2 * size / min(seconds) / 1e9


def in_a_row(device: torch.device) -> int:
    """Steps timed together."""
    return 5 if device.type == "cuda" else 1


def weight(*parts) -> int:
    """Bytes of modules' parameters and buffers, and of optimizers' states."""
    tensors = []
    for part in parts:
        if isinstance(part, torch.nn.Module):
            tensors += [*part.parameters(), *part.buffers()]
        elif part is not None:
            tensors += [v for state in part.state.values() for v in state.values() if torch.is_tensor(v)]
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())


def peak_memory(step: Callable[[], object], device: torch.device, weight: int) -> float | None:
    """GB that a GPU must have for a step: what it keeps (weight, in bytes) and the most that it adds. A CPU does not tell."""
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return (weight + torch.cuda.max_memory_allocated(device) - before) / 1e9


def show(title: str, rows: list[dict], about: dict, path: Path | None, **more: list[dict]) -> None:
    """A Markdown table on stdout, and everything as JSON where asked. more: further tables, by title."""
    print(f"\n{title}\n{', '.join(f'{k} {v}' for k, v in about.items())}\ncommand: python {' '.join(sys.argv)}\n")
    table(rows)
    for name, others in more.items():
        print(f"\n{name}\n")
        table(others)
    sys.stdout.flush()
    if path:
        found = {"title": title, "about": about, "command": sys.argv, "rows": rows, **more}
        path.write_text(json.dumps(found, indent=1, default=str) + "\n")


def table(rows: list[dict]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[form(row.get(name)) for name in names] for row in rows]
    widths = [max(len(name), *(len(row[k]) for row in cells)) for k, name in enumerate(names)]
    for row in [names, ["-" * width for width in widths], *cells]:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")


def form(value) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)
