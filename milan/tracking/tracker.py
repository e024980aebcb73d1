"""Runs in MLflow, without ever standing in the way of the work.

A stage appends events to a spool file; a logger process of its own (`python -m milan.tracking.logger SPOOL`) forwards them. So a
slow, locked or absent store costs a stage nothing, and what could not be delivered stays in the spool and is delivered
by a later stage's logger, or by `python -m milan.tracking.logger`. What loggers have to say goes to .scratch/tracking/log. No
stage imports mlflow: that is the loggers' business (milan/tracking/sender.py), and an edit of it reruns nothing.
"""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil

from milan.core.files import dvc_hash, project_root
from milan.core.redaction import discreet

SPOOLS = Path(".scratch/tracking")
LOG = SPOOLS / "log"
PATIENCE = 120.0  # seconds that the last stage waits for the loggers


class Tracker:
    """The stage's side. Event kinds: start, params, dataset, evaluates, metrics, tags, artifact, model, classifier, end."""

    def __init__(self, spool: Path):
        self.spool = spool

    def event(self, kind: str, **values) -> None:
        line = json.dumps({"kind": kind, "time": int(time.time() * 1000), **values}, default=str)
        with open(self.spool, "a") as file:
            file.write(line + "\n")

    def point(self, point: dict, prefix: str = "train") -> None:
        """One point of a curve: {"step", name: value, ...}."""
        values = {f"{prefix}/{name}": value for name, value in point.items() if name != "step"}
        self.event("metrics", step=point["step"], values=values)

    def results(self, values: dict[str, float]) -> None:
        """What the stage came to: numbers of this run, and of the model that it evaluates."""
        self.event("metrics", step=0, values=values, result=True)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        self.event("artifact", path=str(path.absolute()), folder=folder)

    def reads(self, *splits) -> None:
        """The datasets of this run: splits of records (milan.data.records.Records)."""
        for split in splits:
            self.event("dataset", **{name: discreet(value) for name, value in split.about().items()})

    def model(self, folder: Path, name: str) -> None:
        """Log the weights in a folder as this run's model, known by their DVC hash."""
        self.artifact(folder, "weights")
        self.event("model", name=name, digest=dvc_hash(folder))

    def classifier(self, folder: Path, name: str, registered: str, alias: str) -> None:
        """The same for a classifier that MLflow can serve: a version, and its alias, of a registered model. The weights
        go to MLflow inside that model, and only there."""
        self.event("classifier", path=str(folder), name=name, registered=registered, alias=alias, digest=dvc_hash(folder))

    def evaluates(self, folder: Path) -> None:
        """Link this run, and the results that follow, to the model whose weights lie in a folder."""
        self.event("evaluates", digest=dvc_hash(folder))


class Logger:
    """The stage's tracker and the logger process behind it."""

    def __init__(self, name: str, experiment: str, tags: dict, params: dict):
        SPOOLS.mkdir(parents=True, exist_ok=True)
        warn_of_undelivered()
        self.tracker = Tracker(SPOOLS / f"{time.time_ns()}-{os.getpid()}.jsonl")
        self.alive = hold(self.tracker.spool)
        self.tracker.event("start", name=name, experiment=experiment, pipeline=pipeline_execution(), tags=tags)
        self.tracker.event("params", values={name: discreet(value) for name, value in params.items()})
        # In a session of its own: a Ctrl-C in the terminal ends the stage, and the logger says so in MLflow.
        command = [sys.executable, "-m", "milan.tracking.logger", str(self.tracker.spool)]
        with open(LOG, "a") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)

    def finish(self, status: str, wait: bool = False) -> None:
        """Say the end; wait: until all is delivered, for the last stage, so that a finished pipeline is a finished record.

        In a temporary workspace, which DVC deletes after its last stage, every stage waits, and events that MLflow could not
        take move to the project's own spools."""
        temporary = project_root() != Path.cwd()
        wait = wait or temporary
        self.tracker.event("end", status=status, last=wait)
        os.close(self.alive)
        if not wait:
            return
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            print(f"MLflow is slow to answer; its logger goes on in the background ({LOG}).", file=sys.stderr)
        else:
            for kept in SPOOLS.glob("*-*") if temporary else ():
                (project_root() / SPOOLS).mkdir(parents=True, exist_ok=True)
                shutil.move(kept, project_root() / SPOOLS)
        warn_of_undelivered()


def warn_of_undelivered() -> None:
    """Say when loggers ended without delivering: MLflow was out of reach."""
    left = list(SPOOLS.glob("*.failed"))
    if left:
        print(
            f"MLflow was out of reach for {len(left)} run(s); their events are kept, and sent with the next stage or by "
            f"`python -m milan.tracking.logger`. See {LOG}.",
            file=sys.stderr,
        )


def pipeline_execution() -> str:
    """The same words for all stages of one `dvc repro`: the DVC process that is our ancestor."""
    for parent in psutil.Process().parents():
        with contextlib.suppress(psutil.Error):  # another user's process does not tell its command
            if "dvc" in [Path(word).name for word in parent.cmdline()[:3]]:
                return f"{parent.pid}-{int(parent.create_time())}"
    return f"{os.getpid()}-by-hand"


def hold(spool: Path) -> int:
    """The stage's lock on its spool, as an open file's number; however the stage ends, the system lets go of it then."""
    descriptor = os.open(spool, os.O_CREAT | os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor
