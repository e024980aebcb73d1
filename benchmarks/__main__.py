"""Runs every benchmark in turn, the most important first; prints the tables and writes their JSON into one folder.

    python -m benchmarks              # on one GPU, inside nine minutes
    python -m benchmarks --quick      # on a CPU: small sizes, minutes
    python -m benchmarks --only step loader

Each has a limit of its own, so that none takes the time of those behind it. A table is written as soon as it is known: what
a benchmark had found when it ran into its limit stays. One that fails does not stop the others; the exit status says so.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

FULL = {  # name: script, options, seconds at most; compiled only where that is the question: it takes a minute a model
    "step": ("step", ["--batch", "256"], 170),
    "kernels": ("kernels", [], 70),
    "teacher": ("teacher", [], 60),
    "tasks": ("tasks", ["--repeats", "3"], 100),
    "loader": ("loader", [], 60),
    "parts": ("parts", [], 50),
    "step-512": ("step", ["--batch", "512"], 180),
    "causes": ("causes", [], 200),
    "scaling": ("scaling", [], 200),
    "bank": ("bank", ["--no-compile"], 100),
    "cost": ("cost", ["--no-compile"], 100),
    "cpu": ("cpu", [], 100),
    "startup": ("startup", [], 300),
    "growth": ("growth", [], 300),
}
USUAL = list(FULL)[:7]  # on a GPU; the others by name
LEAST = 5  # seconds, under which none is started
QUICK = {
    "step": ("step", ["--batch", "2", "--repeats", "2", "--precisions", "fp32"], 400),
    "kernels": ("kernels", ["--batch", "2", "--repeats", "1"], 200),
    "teacher": ("teacher", ["--batch", "2", "--repeats", "2"], 200),
    "tasks": ("tasks", ["--model", "tiny", "--batch", "8", "--repeats", "2"], 200),
    "loader": ("loader", ["--images", "40", "--repeats", "3", "--workers", "2", "--batch", "8"], 100),
    "parts": ("parts", ["--model", "tiny", "--batch", "8", "--repeats", "3"], 100),
    "step-512": ("step", ["--model", "tiny", "--batch", "16", "--repeats", "2"], 100),
    "causes": ("causes", ["--model", "tiny", "--repeats", "2"], 100),
    "scaling": ("scaling", ["--model", "tiny", "--processes", "1", "2"], 100),
    "bank": ("bank", ["--model", "tiny", "--images", "32", "--batch", "8", "--repeats", "3"], 100),
    "cost": ("cost", ["--model", "tiny", "--batches", "4", "16", "--sizes", "64", "--repeats", "3"], 100),
    "cpu": ("cpu", ["--model", "tiny", "--repeats", "3"], 100),
    "startup": ("startup", ["--stages", "pretrain", "--repeats", "3"], 100),
    "growth": ("growth", ["--only", "records", "bank", "report", "--repeats", "1"], 100),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, for a CPU")
    parser.add_argument("--only", nargs="+", choices=FULL, help="default: all with --quick, else the first seven")
    parser.add_argument("--seconds", type=float, default=540, help="for all of them, without --quick (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("outs/benchmarks"), help="for the JSON (default: %(default)s)")
    args = parser.parse_args()
    if not args.quick and not torch.cuda.is_available():
        parser.error("torch sees no GPU here: use --quick, or run one script, such as python -m benchmarks.step")
    names = args.only or (list(QUICK) if args.quick else USUAL)
    args.out.mkdir(parents=True, exist_ok=True)
    failed, began = [], time.monotonic()
    for number, name in enumerate(names, start=1):
        spent = time.monotonic() - began
        print(f"\n== {name} ({number} of {len(names)}, {spent:.0f} s so far)", flush=True)
        script, options, limit = (QUICK if args.quick else FULL)[name]
        command = [sys.executable, "-m", f"benchmarks.{script}", *options, "--json", str(args.out / f"{name}.json")]
        if fault := run(command, limit if args.quick else min(limit, args.seconds - spent)):
            failed.append(name)
            print(f"{name}: {fault}", flush=True)
    print(f"\n{len(names) - len(failed)} of {len(names)} benchmarks, figures in {args.out}")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def run(command: list[str], limit: float) -> str | None:
    """Run one script in a process group of its own, which ends with it; what went wrong, in words."""
    if limit < LEAST:
        return "no time was left"
    process = subprocess.Popen(command, start_new_session=True)
    try:
        status = process.wait(limit)
        return f"ended with status {status}" if status else None
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


if __name__ == "__main__":
    main()
