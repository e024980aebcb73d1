"""How long does a stage take before its own first line, and which library takes it?

    python -m benchmarks.startup
    python -m benchmarks.startup --stages pretrain --repeats 9

Starts a Python that imports a stage and ends, in two ways in turn: as `python -m stages.<name>` does, without garbage
collection while libraries load (stages/__init__.py) and without Python's teardown where torch is loaded (milan/core/program.py),
and as Python does by itself. Seconds are of the processor, which other programs on the machine hardly lengthen, and of the wall
clock. The second table is `python -X importtime`: what each library took with all that it imported itself; one that another has
loaded already counts there.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml

from benchmarks import measure

ROOT = Path(__file__).resolve().parents[1]
STAGES = sorted(yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"])
LIBRARIES = ("torch", "torch._dynamo", "torchvision", "timm", "open_clip", "transformers", "mlflow", "pandas", "scipy", "matplotlib")


def ways(stage: str) -> dict[str, str]:
    """Return the code of both ways to start and end."""
    end = "end_at_once()" if "distributed.torchrun()" in (ROOT / "stages" / f"{stage}.py").read_text() else ""
    quick = f"import gc; gc.disable(); import stages.{stage}; from milan.core.program import *; loaded(); {end}"
    return {"as it is": quick, "Python's own": f"import stages.{stage}"}


def run(code: str) -> tuple[float, float]:
    """Return the seconds of processor and wall clock that a Python takes to run this code and end."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{code} ended with status {process.returncode}")
    return used.ru_utime + used.ru_stime, time.perf_counter() - began


def by_library(report: str) -> dict[str, float]:
    """Return seconds by library from what `python -X importtime` printed."""
    lines = re.findall(r"^import time: +\d+ \| +(\d+) \| +(\S+)$", report, re.MULTILINE)
    return {name: int(microseconds) / 1e6 for microseconds, name in lines if name in LIBRARIES}


def main() -> None:
    parser = measure.arguments(__doc__, repeats=5)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, metavar="STAGE", help="default: all")
    args = parser.parse_args()
    cases = {(stage, way): code for stage in args.stages for way, code in ways(stage).items()}
    cases["torch alone", ""] = "import torch"
    seconds: dict[tuple, list] = {case: [] for case in cases}
    for _ in range(args.repeats):
        for case, code in cases.items():
            seconds[case].append(run(code))
    rows = []
    for (stage, way), pairs in seconds.items():
        processor, wall = zip(*pairs, strict=True)
        row = {"case": f"{stage}, {way}".rstrip(", "), "processor s": measure.median(processor), "± %": measure.spread(processor)}
        rows.append(row | {"wall s": measure.median(wall)})
    shares = []
    for stage in args.stages:
        command = [sys.executable, "-X", "importtime", "-c", f"import stages.{stage}"]
        report = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stderr
        shares.append({"stage": stage, **by_library(report)})
    measure.show("Start of a stage", rows, measure.machine(torch.device("cpu")), args.json, **{"Seconds by library": shares})


if __name__ == "__main__":
    main()
