"""What the benchmarks share: cases timed in turn, the machine in words, a small table and its JSON.

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
from milan.training.device import resolve_precision

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
    return resolve_precision(compute(args), torch.device(args.device))


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turn(cases: dict[str, Callable[[], object]], repeats: int, device: torch.device, warm: int = 1) -> dict[str, list[float]]:
    """Seconds of each case, `repeats` times, one case after the other in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    progress = Progress("timing (cases)", len(cases) * (warm + repeats))
    for round_number in range(warm + repeats):
        for name, case in cases.items():
            wait(device)
            began = time.perf_counter()
            case()
            wait(device)
            if round_number >= warm:
                seconds[name].append(time.perf_counter() - began)
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


def show(title: str, rows: list[dict], about: dict, path: Path | None) -> None:
    """A Markdown table on stdout, and everything as JSON where asked."""
    names = list(rows[0])
    cells = [[form(row[name]) for name in names] for row in rows]
    widths = [max(len(name), *(len(row[k]) for row in cells)) for k, name in enumerate(names)]
    print(f"\n{title}\n{', '.join(f'{k} {v}' for k, v in about.items())}\ncommand: python {' '.join(sys.argv)}\n")
    for row in [names, ["-" * width for width in widths], *cells]:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
    if path:
        path.write_text(json.dumps({"title": title, "about": about, "command": sys.argv, "rows": rows}, indent=1) + "\n")


def form(value) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)
