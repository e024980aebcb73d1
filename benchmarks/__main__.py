"""Every benchmark in turn, the tables on stdout and the JSON in one folder.

    python -m benchmarks              # on one GPU under ten minutes
    python -m benchmarks --quick      # on a CPU: small sizes, minutes
    python -m benchmarks --only step loader

A script that fails does not stop the others; the exit status says so.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

FULL = {  # compiled only where that is the question: it takes a minute a model
    "loader": [],
    "teacher": [],
    "step": ["--batch", "256"],
    "kernels": [],
    "cost": ["--no-compile"],
    "bank": ["--no-compile"],
    "scaling": [],
}
QUICK = {
    "loader": ["--images", "40", "--repeats", "3"],
    "teacher": ["--batch", "2", "--repeats", "2"],
    "step": ["--batch", "2", "--repeats", "2", "--precisions", "fp32"],
    "kernels": ["--batch", "2", "--repeats", "1"],
    "cost": ["--model", "tiny", "--batches", "4", "16", "--sizes", "64", "--repeats", "3"],
    "bank": ["--model", "tiny", "--images", "32", "--batch", "8", "--repeats", "3"],
    "scaling": ["--model", "tiny", "--processes", "1", "2"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, for a CPU")
    parser.add_argument("--only", nargs="+", choices=FULL, default=list(FULL))
    parser.add_argument("--out", type=Path, default=Path("outs/benchmarks"), help="for the JSON (default: %(default)s)")
    args = parser.parse_args()
    if not args.quick and not torch.cuda.is_available():
        parser.error("torch sees no GPU here: use --quick, or run one script, such as python -m benchmarks.step")
    args.out.mkdir(parents=True, exist_ok=True)
    failed, began = [], time.monotonic()
    for number, name in enumerate(args.only, start=1):
        print(f"\n== {name} ({number} of {len(args.only)}, {time.monotonic() - began:.0f} s so far)", flush=True)
        options = (QUICK if args.quick else FULL)[name]
        command = [sys.executable, "-m", f"benchmarks.{name}", *options, "--json", str(args.out / f"{name}.json")]
        if subprocess.run(command).returncode:
            failed.append(name)
    print(f"\n{len(args.only) - len(failed)} of {len(args.only)} benchmarks, figures in {args.out}")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
