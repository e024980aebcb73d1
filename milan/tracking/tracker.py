"""Record a stage's run for MLflow without delaying the stage.

A stage appends events to a spool file; its logger process (`python -m milan.tracking.logger SPOOL`) sends them to MLflow. A
slow, locked or absent store therefore costs a stage nothing. Events that could not be sent stay in the spool until a
later stage's logger, or `python -m milan.tracking.logger`, sends them. Loggers write to .scratch/tracking/log. Only loggers
load mlflow (milan/tracking/sender.py); stages do without it.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil

from milan.core.files import dvc_hash, project_root
from milan.core.locks import lock
from milan.core.redaction import redact

SPOOLS = Path(".scratch/tracking")
LOG = SPOOLS / "log"
DELIVERY_TIMEOUT = 120.0  # seconds that the last stage waits for the loggers


class Tracker:
    """Append events to a spool file: start, params, dataset, evaluates, metrics, tags, artifact, text, model,
    classifier, end.

    whole: the events belong to the run of the whole pipeline and not to that of the stage (metrics, artifacts and texts)."""

    def __init__(self, spool: Path, whole: bool = False):
        self.spool, self.whole = spool, whole

    @property
    def pipeline(self) -> "Tracker":
        """The tracker of the whole pipeline's run."""
        return Tracker(self.spool, whole=True)

    def event(self, kind: str, **values) -> None:
        """Append one event with the current time, as a line of JSON."""
        whole = {"whole": True} if self.whole else {}
        line = json.dumps({"kind": kind, "time": int(time.time() * 1000), **whole, **values}, default=str)
        with open(self.spool, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def point(self, point: dict, prefix: str = "train") -> None:
        """Log one point of a curve: {"step", name: value, ...}."""
        values = {f"{prefix}/{name}": value for name, value in point.items() if name != "step"}
        self.event("metrics", step=point["step"], values=values)

    def results(self, values: dict[str, float]) -> None:
        """Log the stage's results, as metrics of this run and of the model that it evaluates."""
        self.event("metrics", step=0, values=values, result=True)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Log a file, or what a folder holds, as artifacts of this run, in a folder of its artifacts."""
        self.event("artifact", path=str(path.absolute()), folder=folder)

    def text(self, text: str, name: str) -> None:
        """Log a text as an artifact of this run, a file of this name."""
        self.event("text", text=text, name=name)

    def reads(self, *splits) -> None:
        """Log splits of records (milan.data.records.Records) as the datasets of this run."""
        for split in splits:
            self.event("dataset", **{name: redact(value) for name, value in split.about().items()})

    def model(self, folder: Path, name: str) -> None:
        """Log the weights in a folder as this run's model, identified by their DVC hash."""
        self.artifact(folder, "weights")
        self.event("model", name=name, digest=dvc_hash(folder))

    def classifier(self, folder: Path, name: str, registered: str, alias: str, tags: dict) -> None:
        """Log a classifier as a version, with these tags, of a registered model, which MLflow can serve; set the alias on it.

        MLflow stores the weights inside that model only."""
        names = {"name": name, "registered": registered, "alias": alias}
        self.event("classifier", path=str(folder), **names, tags=tags, digest=dvc_hash(folder))

    def evaluates(self, folder: Path) -> None:
        """Link this run, and the results that it logs from now on, to the model whose weights are in a folder."""
        self.event("evaluates", digest=dvc_hash(folder))


class LoggerProcess:
    """A stage's tracker with a new spool, and the process that sends its events to MLflow.

    recipe: {dotted key: value} of the whole recipe; params: of the settings that the stage's run shows."""

    def __init__(self, name: str, experiment: str, tags: dict, recipe: dict, params: dict):
        SPOOLS.mkdir(parents=True, exist_ok=True)
        warn_of_undelivered()
        self.tracker = Tracker(SPOOLS / f"{time.time_ns()}-{os.getpid()}.jsonl")
        self.spool_lock = lock(self.tracker.spool)  # for as long as the stage lives; the system unlocks it at its end
        whole = {"pipeline": pipeline_execution(), "recipe": redacted(recipe)}
        self.tracker.event("start", name=name, experiment=experiment, tags=tags, **whole)
        self.tracker.event("params", values=redacted(params))
        # In its own session: Ctrl-C in the terminal ends the stage, and the logger reports that to MLflow.
        command = [sys.executable, "-m", "milan.tracking.logger", str(self.tracker.spool)]
        with open(LOG, "a", encoding="utf-8") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)

    def finish(self, status: str, wait: bool = False) -> None:
        """Append the end event. wait: wait until all is delivered, as the last stage does, so that MLflow has the whole pipeline.

        In a temporary workspace, which DVC deletes after its last stage, every stage waits, and events that MLflow could not
        take move to the project's own spools."""
        temporary = project_root() != Path.cwd()
        wait = wait or temporary
        self.tracker.event("end", status=status, last=wait)
        os.close(self.spool_lock)
        if not wait:
            return
        try:
            self.process.wait(DELIVERY_TIMEOUT)
        except subprocess.TimeoutExpired:
            print(f"MLflow is slow to answer; its logger goes on in the background ({LOG}).", file=sys.stderr)
        else:
            for kept in SPOOLS.glob("*-*") if temporary else ():
                (project_root() / SPOOLS).mkdir(parents=True, exist_ok=True)
                shutil.move(kept, project_root() / SPOOLS)
        warn_of_undelivered()


def redacted(settings: dict) -> dict:
    return {name: redact(value) for name, value in settings.items()}


def warn_of_undelivered() -> None:
    """Print a warning with the reasons when loggers could not deliver their spools."""
    reasons = []
    for mark in sorted(SPOOLS.glob("*.failed")):
        with contextlib.suppress(FileNotFoundError):  # a logger has just delivered it
            reasons.append(mark.read_text(encoding="utf-8"))
    if reasons:
        print(
            f"{len(reasons)} run(s) have not arrived. {'. '.join(dict.fromkeys(reasons))}. Their events are kept, and sent with the "
            f"next stage or by `python -m milan.tracking.logger`. See {LOG}.",
            file=sys.stderr,
        )


def pipeline_execution() -> str:
    """Return an id that all stages of one `dvc repro` share: MILAN_PIPELINE where it is set, else process number and start
    time of the DVC process above this one. Slurm's srun starts processes without that ancestor, so docs/slurm.sh sets it."""
    if given := os.environ.get("MILAN_PIPELINE"):
        return given
    for parent in psutil.Process().parents():
        with contextlib.suppress(psutil.Error):  # another user's process does not tell its command
            if "dvc" in [Path(word).name for word in parent.cmdline()[:3]]:
                return f"{parent.pid}-{int(parent.create_time())}"
    return f"{os.getpid()}-by-hand"
