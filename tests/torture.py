"""Run a whole pipeline under many kinds of faults: its results must be those of an undisturbed run.

    make torture        or        python -m tests.torture [--only FAULT ...] [--kills 20] [--seed 0] [--json FILE]

The command clones HEAD into a temporary folder, runs it once at smoke scale and keeps dvc.lock as the truth. Then it plays the
faults of tests/torture_faults.py and prints, for each, how often it was tried and how often the pipeline survived. All random
choices follow from the seed. A fault that needs a missing right (to mount a small disk) is skipped, with a message.
Exit status: 0 all survived, 1 otherwise. About half an hour on two cores; nothing outside of the clone is changed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
import yaml

from milan.core.progress import Progress

ROOT = Path(__file__).resolve().parents[1]
STARTS = "Running stage '"
PATIENCE = 1800  # seconds for any one command


class Wrong(Exception):
    """A consequence that a fault must not have."""


@dataclass
class Row:
    """A line of the table: how often a fault was tried and survived, or why it was skipped."""

    fault: str
    tried: int = 0
    survived: int = 0
    wrong: list[str] = field(default_factory=list)
    skipped: str = ""

    def __str__(self) -> str:
        words = f"skipped: {self.skipped}" if self.skipped else f"{self.tried:5d}  {self.survived:8d}"
        return "\n".join([f"{self.fault:58s} {words}", *(f"    {text}" for text in self.wrong)])


class Running:
    """A command in a session of its own, whose output is read while it runs."""

    def __init__(self, command: list[str], folder: Path, environment: dict[str, str]):
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self.process = subprocess.Popen(command, cwd=folder, env=environment, text=True, start_new_session=True, **pipes)
        self.said, self.stages = "", {}
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        for line in self.process.stdout:
            self.said += line
            if line.startswith(STARTS):
                self.stages[line.split("'")[1]] = time.monotonic()

    def wait(self) -> str:
        """Wait until the command ends and return its output."""
        self.process.wait(PATIENCE)
        self.reader.join(60)
        return self.said

    def until(self, condition) -> bool:
        """Wait for condition() and return True, or False when the command ends before."""
        while self.process.poll() is None:
            if condition():
                return True
            time.sleep(0.02)
        return False


class Clone:
    """A clone of HEAD, its undisturbed run, and the commands that faults are played against."""

    def __init__(self, folder: Path):
        self.folder, self.outs = folder, folder / "outs/smoke"
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment = {**os.environ, "PATH": path, "OMP_WAIT_POLICY": "PASSIVE"}
        self.environment.pop("MLFLOW_TRACKING_URI", None)
        self.kept = folder / "torture.json"
        if not folder.exists():
            subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
            (folder / "dvc.lock").unlink()

    def start(self, *words: str, **environment: str) -> Running:
        return Running([sys.executable, *words], self.folder, {**self.environment, **environment})

    def dvc(self, *words: str, **environment: str) -> Running:
        return self.start("-m", "dvc", *words, **environment)

    def run_once(self) -> None:
        """Do the undisturbed run, unless an earlier call kept the clone and its truth."""
        if not self.kept.exists():
            self.kept.write_text(json.dumps(self.undisturbed()))
        self.truth, self.seconds = json.loads(self.kept.read_text()).values()

    def undisturbed(self) -> dict:
        """Run the pipeline and return dvc.lock and the seconds that each stage took, in their order."""
        running = self.dvc("exp", "run", "-S", "scale=smoke")
        said, end = running.wait(), time.monotonic()
        if running.process.returncode:
            raise SystemExit(f"The undisturbed run failed:\n{said[-3000:]}")
        times = [*running.stages.values(), end]
        seconds = {stage: after - at for stage, at, after in zip(running.stages, times, times[1:])}
        return {"lock": self.lock(), "seconds": seconds}

    def lock(self) -> dict:
        """Return the stages of dvc.lock. A file that DVC was killed over while it wrote it is removed first, as
        docs/reproducibility.md says: the cache has all results."""
        path = self.folder / "dvc.lock"
        try:
            return yaml.safe_load(path.read_text())["stages"] if path.exists() else {}
        except (TypeError, KeyError, yaml.YAMLError):
            print("    dvc.lock was cut by a kill: removed", flush=True)
            path.unlink()
            return {}

    def forget(self) -> None:
        """Remove all results; the recipe stays at smoke scale."""
        for name in ("dvc.lock", "outs", ".scratch", ".dvc/cache"):
            path = self.folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def finish(self, *words: str, **environment: str) -> str:
        """Run `dvc repro` to the end, demand that dvc.lock is the truth, and return the output."""
        running = self.dvc("repro", *words, **environment)
        said = running.wait()
        demand(running.process.returncode == 0, f"`dvc repro` failed: {said[-600:]}")
        demand(self.lock() == self.truth, f"dvc.lock differs in {', '.join(differing(self.lock(), self.truth))}")
        return said

    def processes(self) -> list[psutil.Process]:
        """Return the processes that run in the clone, except loggers, which outlive a stage on purpose."""
        running = []
        for process in psutil.process_iter():
            try:
                inside = Path(process.cwd()).is_relative_to(self.folder)
                if inside and process.status() != psutil.STATUS_ZOMBIE and "milan.tracking.logger" not in process.cmdline():
                    running.append(process)
            except psutil.Error:
                continue
        return running

    def no_orphans(self, seconds: float = 30) -> None:
        """Demand that all processes of the clone end by themselves; name and kill those that do not."""
        end = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < end:
            time.sleep(0.2)
        for process in left:
            process.kill()
        demand(not left, f"still running after {seconds:.0f} s: {'; '.join(str(process) for process in left)}")


def demand(condition: bool, otherwise: str) -> None:
    if not condition:
        raise Wrong(otherwise)


def differing(one: dict, other: dict) -> list[str]:
    return sorted(stage for stage in one.keys() | other.keys() if one.get(stage) != other.get(stage))


def last_error(said: str) -> str:
    """Return a stage's error message as one line. Demands that there is one, and no traceback."""
    demand("Traceback" not in said, f"a traceback: {said[-600:]}")
    _, separator, rest = said.rpartition("\nerror: ")
    demand(bool(separator), f"no error is said: {said[-600:]}")
    return " ".join(rest.split("\n\n")[0].split())


def arguments(parsed: list[str] | None, faults: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.torture", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=faults, metavar="FAULT", default=faults, help=", ".join(faults))
    parser.add_argument("--kills", type=int, default=20, help="kill -9; a quarter as many of SIGTERM and Ctrl-C (default: 20)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=Path("torture.json"), help="the table for programs (default: %(default)s)")
    parser.add_argument("--keep", type=Path, help="a folder for the clone, to be used again by the next call")
    return parser.parse_args(parsed)


def play(name: str, trials: list, progress: Progress) -> Row:
    """Run the trials of a fault, [(what, callable that raises Wrong)], and return its row."""
    row = Row(name)
    for what, trial in trials:
        print(f"{name}: {what}", flush=True)
        row.tried += 1
        try:
            trial()
            row.survived += 1
        except Exception as wrong:  # Wrong, or any other error
            row.wrong.append(f"{what}: {type(wrong).__name__}: {wrong}")
            print(f"    DID NOT SURVIVE: {row.wrong[-1]}", flush=True)
        progress.update()
    return row


def main(parsed: list[str] | None = None) -> int:
    from tests import torture_faults

    options = arguments(parsed, list(torture_faults.FAULTS))
    with tempfile.TemporaryDirectory() as folder:
        clone = Clone(options.keep or Path(folder) / "milan")
        print("an undisturbed run at smoke scale, whose dvc.lock is the truth", flush=True)
        clone.run_once()
        chosen = {name: torture_faults.FAULTS[name](clone, options) for name in options.only}
        progress = Progress("torture", sum(len(trials) for trials in chosen.values() if not isinstance(trials, str)))
        rows = [
            Row(name, skipped=trials) if isinstance(trials, str) else play(name, trials, progress)
            for name, trials in chosen.items()
        ]
        progress.close()
    options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    print(f"\n{'fault':58s} tried  survived")
    print("\n".join(map(str, rows)))
    return int(any(row.wrong for row in rows))


if __name__ == "__main__":
    import tests.torture  # not __main__: the faults import this module too, and it must not be loaded twice

    raise SystemExit(tests.torture.main())
