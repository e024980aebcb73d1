"""The logger process: takes what stages left in their spools to MLflow.

    python -m milan.tracking.logger [SPOOL]

With a spool it serves a stage until that ends, after what earlier loggers could not deliver, and then the later stages of
the same `dvc repro`, since mlflow takes seconds to load; without one it delivers all that is kept. Loggers take turns, in
the order of their stages. No stage imports this, nor what it needs of mlflow.
"""

import contextlib
import fcntl
import json
import sys
import time
import warnings
from itertools import groupby
from pathlib import Path
from typing import TextIO

import psutil

from milan.core.redaction import discreet
from milan.tracking.store import knock, store_uri
from milan.tracking.tracker import SPOOLS, warn_of_undelivered


def serve(spool: Path | None) -> None:
    """Deliver what earlier loggers left behind, this spool until its stage ends, and the stages' after it; all there is, for
    None."""
    SPOOLS.mkdir(parents=True, exist_ok=True)
    with open(SPOOLS / "lock", "w") as lock:
        while not taken(lock):
            if spool and not spool.exists():
                return  # another logger has delivered it
            time.sleep(0.5)
        pipeline = pipeline_of(spool) if spool else None
        go_on = [deliver(kept) for kept in spools() if spool is None or kept.name <= spool.name]
        while all(go_on) and running(pipeline):
            time.sleep(0.5)
            go_on = [deliver(kept) for kept in spools() if pipeline_of(kept) == pipeline]


def taken(lock: TextIO, kind: int = fcntl.LOCK_EX) -> bool:
    """Whether the lock was free, and so is ours until the file is closed."""
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def spools() -> list[Path]:
    return sorted(SPOOLS.glob("*.jsonl"))


def pipeline_of(spool: Path) -> str | None:
    """The pipeline execution that a spool's stage belongs to; None for one that is gone, or has no first line yet."""
    with contextlib.suppress(OSError, ValueError, AttributeError), open(spool) as file:
        return json.loads(file.readline()).get("pipeline")


def running(pipeline: str | None) -> bool:
    """Whether the DVC process of tracking.pipeline_execution is still there."""
    process, _, began = (pipeline or "").partition("-")
    with contextlib.suppress(psutil.Error, ValueError):
        found = psutil.Process(int(process))
        return str(int(found.create_time())) == began and found.status() != psutil.STATUS_ZOMBIE
    return False


def deliver(spool: Path) -> bool:
    """Forward a spool; on any trouble with the store, mark it as still to be sent. False: after this one, stop."""
    mark = spool.with_suffix(".failed")
    try:
        knock(store_uri())
        last = forward(spool)
        mark.unlink(missing_ok=True)
        return not last
    except Exception as error:  # whatever ails the store must not lose events
        mark.touch()
        print(
            f"{spool.name}: MLflow cannot be reached ({type(error).__name__}: {discreet(str(error)[:500])}); kept for the next logger.",
            flush=True,
        )
        return False


def owner_alive(spool: Path) -> bool:
    with open(spool) as file:
        return not taken(file, fcntl.LOCK_SH)


def forward(spool: Path) -> bool:
    """Send a spool's events until its stage ends; its place and run are kept beside it, so that nothing is sent twice.
    Whether the stage says that it was the last of its pipeline, and waits."""
    from milan.tracking.sender import (
        Sender,  # here, because an installation without mlflow is trouble with the store as well
    )

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
                events = [json.loads(line) for line in said]
                sender.send(events)
                offset = state["offset"] + sum(map(len, said))
                state = {"offset": offset, "run_id": sender.run_id, "model_id": sender.model_id}
                place.write_text(json.dumps(state))
    spool.unlink()
    place.unlink()
    return bool(events[-1].get("last"))


def last_words() -> bytes:
    """Of a stage that died without any."""
    return json.dumps({"kind": "end", "status": "KILLED", "time": int(time.time() * 1000)}).encode()


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # MLflow's advice; what goes wrong is raised
    serve(Path(sys.argv[1]) if sys.argv[1:] else None)
    if not sys.argv[1:]:
        warn_of_undelivered()
