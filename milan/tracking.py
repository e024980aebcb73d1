"""Runs in MLflow, without ever standing in the way of the work.

A stage appends events to a spool file; a logger process of its own (`python -m milan.tracking SPOOL`), the only
place that imports mlflow, forwards them. So a slow, locked or absent store costs a stage nothing, and what could
not be delivered stays in the spool and is delivered by a later stage's logger, or by `python -m milan.tracking`.
Loggers take turns, in the order of their stages; what they have to say goes to .scratch/tracking/log.
"""

import contextlib
import fcntl
import json
import logging
import os
import socket
import subprocess
import sys
import time
from itertools import groupby
from pathlib import Path
from urllib.parse import unquote, urlsplit

import psutil

from milan.files import dvc_hash

SPOOLS = Path(".scratch/tracking")
LOG = SPOOLS / "log"
PATIENCE = 120.0  # seconds that the last stage waits for the loggers
KNOCK = 10.0  # seconds that a server has to show itself


class Tracker:
    """The stage's side. Event kinds: start, params, metrics, tags, artifact, model, evaluates, end."""

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

    def artifact(self, path: Path, folder: str | None = None) -> None:
        self.event("artifact", path=str(path), folder=folder)

    def model(self, folder: Path, name: str) -> None:
        """Register the weights in a folder as this run's model, known by their DVC hash."""
        self.artifact(folder, "weights")
        self.event("model", name=name, digest=dvc_hash(folder))

    def evaluates(self, folder: Path) -> None:
        """Link this run, and the metrics that follow, to the model whose weights lie in a folder."""
        self.event("evaluates", digest=dvc_hash(folder))


class Logger:
    """The stage's tracker and the logger process behind it."""

    def __init__(self, name: str, experiment: str, tags: dict, params: dict):
        SPOOLS.mkdir(parents=True, exist_ok=True)
        warn_of_undelivered()
        self.tracker = Tracker(SPOOLS / f"{time.time_ns()}-{os.getpid()}.jsonl")
        self.alive = hold(self.tracker.spool)
        self.tracker.event("start", name=name, experiment=experiment, pipeline=pipeline_execution(), tags=tags)
        self.tracker.event("params", values=params)
        # In a session of its own: a Ctrl-C in the terminal ends the stage, and the logger says so in MLflow.
        command = [sys.executable, "-m", "milan.tracking", str(self.tracker.spool)]
        with open(LOG, "a") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)

    def finish(self, status: str, wait: bool = False) -> None:
        """wait: for the last stage, so that a finished pipeline is a finished record."""
        self.tracker.event("end", status=status)
        os.close(self.alive)
        if not wait:
            return
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            print(f"MLflow is slow to answer; its logger goes on in the background ({LOG}).", file=sys.stderr)
        warn_of_undelivered()


def warn_of_undelivered() -> None:
    """Say when loggers ended without delivering: MLflow was out of reach."""
    left = list(SPOOLS.glob("*.failed"))
    if left:
        print(
            f"MLflow was out of reach for {len(left)} run(s); their events are kept, and sent with the next stage or by "
            f"`python -m milan.tracking`. See {LOG}.",
            file=sys.stderr,
        )


def pipeline_execution() -> str:
    """The same words for all stages of one `dvc repro`: the DVC process that is our ancestor."""
    for parent in psutil.Process().parents():
        with contextlib.suppress(psutil.Error):  # another user's process does not tell its command
            if "dvc" in [Path(word).name for word in parent.cmdline()[:3]]:
                return f"{parent.pid}-{int(parent.create_time())}"
    return f"{os.getpid()}-by-hand"


def project_root() -> Path:
    """Where mlflow.db lies: the repository, also for an experiment that DVC's queue runs in .dvc/tmp/exps/..."""
    here = Path.cwd()
    return Path(*here.parts[: here.parts.index(".dvc")]) if ".dvc" in here.parts else here


def store_uri() -> str:
    """The store, without a password: it goes into variables that mlflow reads, and so into no text that mlflow writes."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{project_root()}/mlflow.db"
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https") or "@" not in parts.netloc:
        return uri
    os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(parts.username or "")
    os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(parts.password or "")
    os.environ["MLFLOW_TRACKING_URI"] = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    return os.environ["MLFLOW_TRACKING_URI"]


def knock(uri: str) -> None:
    """OSError within seconds when a server is not there: mlflow would try for minutes, for every spool again."""
    import requests

    parts = urlsplit(uri)
    if parts.scheme in ("http", "https"):
        with contextlib.suppress(requests.exceptions.SSLError):  # somebody answered: mlflow has its own settings for TLS
            answer = requests.get(uri, timeout=KNOCK, allow_redirects=False)
            if answer.status_code in (502, 503, 504):  # a proxy, and nobody behind it
                raise ConnectionError(f"{uri} answers {answer.status_code} {answer.reason}")
    elif parts.hostname and parts.port:
        socket.create_connection((parts.hostname, parts.port), timeout=KNOCK).close()


def serve(spool: Path | None) -> None:
    """Deliver what earlier loggers left behind, then this spool until its stage ends; all there is, for None."""
    SPOOLS.mkdir(parents=True, exist_ok=True)
    with open(SPOOLS / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for kept in sorted(SPOOLS.glob("*.jsonl")):
            if spool is None or kept.name <= spool.name:
                deliver(kept)


def deliver(spool: Path) -> None:
    """Forward a spool; on any trouble with the store, mark it as still to be sent."""
    mark = spool.with_suffix(".failed")
    try:
        knock(store_uri())
        forward(spool)
        mark.unlink(missing_ok=True)
    except Exception as error:  # whatever ails the store must not lose events
        mark.touch()
        print(
            f"{spool.name}: MLflow cannot be reached ({type(error).__name__}: {str(error)[:500]}); kept for the next logger.",
            flush=True,
        )


def hold(spool: Path) -> int:
    """The stage's lock on its spool, as an open file's number; however the stage ends, the system lets go of it then."""
    descriptor = os.open(spool, os.O_CREAT | os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def owner_alive(spool: Path) -> bool:
    with open(spool) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def forward(spool: Path) -> None:
    """Send a spool's events until its stage ends; its place and run are kept beside it, so that nothing is sent twice."""
    place = spool.with_suffix(".place")
    state = json.loads(place.read_text()) if place.exists() else {"offset": 0, "run_id": None, "model_id": None}
    sender = Sender(state["run_id"], state["model_id"], owner_alive(spool))
    ended = False
    with open(spool, "rb") as file:
        while not ended:
            alive = owner_alive(spool)  # asked before reading: what a stage says last is not missed
            file.seek(state["offset"])
            found = file.read()
            lines = found[: found.rfind(b"\n") + 1].splitlines(keepends=True)  # one that is being written is read again
            if not lines and alive:
                time.sleep(0.5)
                continue
            for kind, group in groupby(lines or [last_words()], lambda line: json.loads(line)["kind"]):
                said, ended = list(group), kind == "end"
                sender.send([json.loads(line) for line in said])
                offset = state["offset"] + sum(map(len, said))
                state = {"offset": offset, "run_id": sender.run_id, "model_id": sender.model_id}
                place.write_text(json.dumps(state))
    spool.unlink()
    place.unlink()


def last_words() -> bytes:
    """Of a stage that died without any."""
    return json.dumps({"kind": "end", "status": "KILLED", "time": int(time.time() * 1000)}).encode()


class Sender:
    """Events -> MLflow calls on one run."""

    def __init__(self, run_id: str | None, model_id: str | None, live: bool):
        os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        import mlflow

        self.mlflow, self.entities, self.run_id, self.model_id = mlflow, mlflow.entities, run_id, model_id
        self.live, self.monitor = live, None
        self.client = mlflow.MlflowClient(store_uri())

    def send(self, events: list[dict]) -> None:
        metrics = []
        for event in events:
            kind = event["kind"]
            if kind == "metrics":
                metrics += [self.metric(event, *item) for item in event["values"].items()]
            else:
                getattr(self, f"send_{kind}")(event)
        for first in range(0, len(metrics), 1000):
            self.client.log_batch(self.run_id, metrics=metrics[first : first + 1000])

    def metric(self, event: dict, name: str, value: float):
        return self.entities.Metric(name, float(value), event["time"], event["step"], model_id=self.model_id)

    def send_model(self, event: dict) -> None:
        experiment = self.client.get_run(self.run_id).info.experiment_id
        tags = {"dvc": event["digest"] or "", "weights": f"runs:/{self.run_id}/weights"}
        model = self.client.create_logged_model(experiment, event["name"], self.run_id, tags)
        self.client.finalize_logged_model(model.model_id, "READY")
        self.client.log_outputs(self.run_id, [self.entities.LoggedModelOutput(model.model_id, 0)])

    def send_evaluates(self, event: dict) -> None:
        experiment = self.client.get_run(self.run_id).info.experiment_id
        newest = [{"field_name": "creation_timestamp", "ascending": False}]
        found = self.client.search_logged_models([experiment], f"tags.dvc = '{event['digest']}'", max_results=1, order_by=newest)
        if found:
            self.model_id = found[0].model_id
            self.client.log_inputs(self.run_id, models=[self.entities.LoggedModelInput(self.model_id)])

    def send_start(self, event: dict) -> None:
        experiment = self.experiment(event["experiment"])
        parent = self.parent(experiment, event["pipeline"], event["tags"])
        tags = {**event["tags"], "mlflow.parentRunId": parent, "mlflow.source.name": event["tags"]["stage"]}
        run = self.client.create_run(experiment, start_time=event["time"], tags=tags, run_name=event["name"])
        self.run_id, self.parent_id = run.info.run_id, parent
        if self.live:
            self.watch_system()

    def experiment(self, name: str) -> str:
        found = self.client.get_experiment_by_name(name)
        if found:
            return found.experiment_id
        local = not os.environ.get("MLFLOW_TRACKING_URI")
        return self.client.create_experiment(
            name, artifact_location=(project_root() / "mlartifacts" / name).as_uri() if local else None
        )

    def parent(self, experiment: str, pipeline: str, tags: dict) -> str:
        """The run of this pipeline execution, made by its first stage."""
        found = self.client.search_runs([experiment], f"tags.pipeline = '{pipeline}'", max_results=1)
        if found:
            return found[0].info.run_id
        kept = {k: v for k, v in tags.items() if k in ("scale", "git_revision", "mlflow.user")}
        name = time.strftime(f"pipeline {tags['scale']} %Y-%m-%d %H:%M")
        return self.client.create_run(experiment, tags={**kept, "pipeline": pipeline}, run_name=name).info.run_id

    def watch_system(self) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self.mlflow.set_tracking_uri(self.client.tracking_uri)
        self.monitor = SystemMetricsMonitor(self.run_id, sampling_interval=5, samples_before_logging=2)
        self.monitor.start()

    def send_params(self, event: dict) -> None:
        params = [self.entities.Param(k, str(v)[:6000]) for k, v in event["values"].items()]
        for first in range(0, len(params), 100):
            self.client.log_batch(self.run_id, params=params[first : first + 100])

    def send_tags(self, event: dict) -> None:
        self.client.log_batch(self.run_id, tags=[self.entities.RunTag(k, str(v)) for k, v in event["values"].items()])

    def send_artifact(self, event: dict) -> None:
        if os.path.exists(event["path"]):
            self.client.log_artifact(self.run_id, event["path"], event["folder"])

    def send_end(self, event: dict) -> None:
        if self.monitor:
            self.monitor.finish()
        if self.run_id is None:
            return
        self.client.set_terminated(self.run_id, event["status"], event["time"])
        parent = self.client.get_run(self.run_id).data.tags.get("mlflow.parentRunId")
        if parent:
            self.client.set_terminated(parent, event["status"], event["time"])


if __name__ == "__main__":
    serve(Path(sys.argv[1]) if sys.argv[1:] else None)
    if not sys.argv[1:]:
        warn_of_undelivered()
