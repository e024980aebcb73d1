"""The logger process: sends the events in the stages' spools to MLflow.

    python -m milan.tracking.logger [SPOOL]

With a spool, it sends what earlier loggers could not deliver, then this spool until its stage ends, then those of later
stages of the same `dvc repro` (loading mlflow takes seconds, so one process serves them all). Without a spool, it sends
all that is left. One logger works at a time, in the order of the stages. Stages do not import this module.
"""

import contextlib
import json
import os
import sys
import time
import warnings
from itertools import groupby
from pathlib import Path

import psutil

from milan.core.files import project_root
from milan.core.locks import lock
from milan.core.redaction import redact
from milan.tracking.store import check_reachable, follow_project, store_uri
from milan.tracking.tracker import SPOOLS, warn_of_undelivered


def serve(spool: Path | None) -> None:
    """Deliver the spools before this one, this one until its stage ends, and those of the pipeline's later stages.

    None delivers all spools."""
    SPOOLS.mkdir(parents=True, exist_ok=True)
    while (held := lock(SPOOLS / "lock", wait=False)) is None:
        if spool and not spool.exists():
            return  # another logger has delivered it
        time.sleep(0.5)
    try:
        if spool is None:
            follow_project(project_root())
        pipeline = pipeline_of(spool) if spool else None
        go_on = [deliver(each) for each in spools() if spool is None or each.name <= spool.name]
        while all(go_on) and is_running(pipeline):
            time.sleep(0.5)
            go_on = [deliver(each) for each in spools() if pipeline_of(each) == pipeline]
    finally:
        os.close(held)


def spools() -> list[Path]:
    """Return all spools, oldest first."""
    return sorted(SPOOLS.glob("*.jsonl"))


def pipeline_of(spool: Path) -> str | None:
    """Return the pipeline execution of a spool's stage; None when the spool is gone or has no first line yet."""
    with contextlib.suppress(OSError, ValueError, AttributeError), open(spool, encoding="utf-8") as file:
        return json.loads(file.readline()).get("pipeline")


def is_running(pipeline: str | None) -> bool:
    """Return whether the DVC process named by tracker.pipeline_execution still runs."""
    number, _, began = (pipeline or "").partition("-")
    with contextlib.suppress(psutil.Error, ValueError):
        process = psutil.Process(int(number))
        return str(int(process.create_time())) == began and process.status() != psutil.STATUS_ZOMBIE
    return False


def deliver(spool: Path) -> bool:
    """Send a spool; on any error of the store, mark it with the reason and keep it for the next logger.

    Returns False when the logger should stop after this spool: after an error, or after the pipeline's last stage."""
    mark = spool.with_suffix(".failed")
    try:
        check_reachable(store_uri())
        last = send_spool(spool)
        mark.unlink(missing_ok=True)
        return not last
    except Exception as error:  # no error of the store may lose events
        mark.write_text(reason := reason_of(error), encoding="utf-8")
        print(f"{spool.name}: {reason}; kept for the next logger.", flush=True)
        return False


def reason_of(error: Exception) -> str:
    """Return why the store took no events: that it cannot be reached, or what MLflow itself says."""
    kind, said = type(error).__name__, redact(" ".join(str(error).split())[:500].rstrip(". "))
    return f"MLflow cannot be reached ({kind}: {said})" if isinstance(error, OSError) else f"MLflow says ({kind}): {said}"


def stage_alive(spool: Path) -> bool:
    """Return whether the stage that writes this spool still runs: it holds a lock on it."""
    unlocked = lock(spool, shared=True, wait=False)
    if unlocked is not None:
        os.close(unlocked)
    return unlocked is None


def send_spool(spool: Path) -> bool:
    """Send a spool's events until its stage ends, and return whether that stage is the last of its pipeline.

    The offset and the run's id are kept in a file beside the spool, so that nothing is sent twice."""
    from milan.tracking.sender import Sender  # here: without mlflow installed, deliver() keeps the spool

    state_file = spool.with_suffix(".place")
    state = (
        json.loads(state_file.read_text(encoding="utf-8"))
        if state_file.exists()
        else {"offset": 0, "run_id": None, "model_id": None}
    )
    sender = Sender(state["run_id"], state["model_id"], stage_alive(spool))
    ended = False
    with open(spool, "rb") as file:
        while not ended:
            alive = stage_alive(spool)  # asked before reading, so that the last events are not missed
            file.seek(state["offset"])
            data = file.read()
            lines = data[: data.rfind(b"\n") + 1].splitlines(keepends=True)  # an incomplete line is read again later
            if not lines and alive:
                time.sleep(0.5)
                continue
            for kind, group in groupby(lines or [killed_event()], lambda line: json.loads(line)["kind"]):
                sent, ended = list(group), kind == "end"
                events = [json.loads(line) for line in sent]
                sender.send(events)
                offset = state["offset"] + sum(map(len, sent))
                state = {"offset": offset, "run_id": sender.run_id, "model_id": sender.model_id}
                state_file.write_text(json.dumps(state), encoding="utf-8")
    spool.unlink()
    state_file.unlink()
    return bool(events[-1].get("last"))


def killed_event() -> bytes:
    """Return the end event of a stage that died without writing one."""
    return json.dumps({"kind": "end", "status": "KILLED", "time": int(time.time() * 1000)}).encode()


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # MLflow's advice; errors are raised
    serve(Path(sys.argv[1]) if sys.argv[1:] else None)
    if not sys.argv[1:]:
        warn_of_undelivered()
