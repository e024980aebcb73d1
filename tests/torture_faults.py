"""The faults of tests/torture.py. Each takes a clone that has run once and returns its trials [(what, callable)], or the reason
why it is skipped. A trial plays its fault, runs the user's next command, and raises Wrong where a result differs from the truth.
"""

import contextlib
import functools
import json
import os
import random
import re
import shlex
import signal
import socketserver
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from milan.core.files import dvc_hash
from milan.params import read_params
from milan.stage import filled
from tests.torture import Clone, Running, demand, differing, last_error

Trials = list[tuple[str, Callable[[], None]]]

# Interruptions of a run from nothing.

VICTIMS = ("all", "all", "the stage", "dvc")  # of a kill -9: mostly all processes, sometimes only one


@dataclass(frozen=True)
class Blow:
    """A signal that is sent `after` seconds from the start of a stage."""

    stage: str
    after: float
    signal: int
    victim: str = "all"

    def __str__(self) -> str:
        return f"{signal.Signals(self.signal).name} to {self.victim}, {self.after:.1f} s into {self.stage}"


def blows(seconds: dict[str, float], n: int, number: int, draw: random.Random) -> list[Blow]:
    """Draw n blows in the order of the stages: every stage is hit before any is hit twice, and longer ones are hit more often."""
    stages = list(seconds)
    chosen = draw.sample(stages, min(n, len(stages))) + draw.choices(stages, list(seconds.values()), k=max(0, n - len(stages)))
    victims = VICTIMS if number == signal.SIGKILL else VICTIMS[:1]
    return [Blow(s, draw.uniform(0, seconds[s]), number, draw.choice(victims)) for s in sorted(chosen, key=stages.index)]


def interruptions(number: int, share: float, clone: Clone, options) -> Trials:
    """Return the trials of a run from nothing that is interrupted by every blow and continued by `dvc repro` after each."""
    draw = random.Random(f"{options.seed} {number}")
    dealt = blows(clone.seconds, max(1, round(options.kills * share)), number, draw)
    hits = [(str(blow), functools.partial(hit, clone, blow, fresh=blow is dealt[0])) for blow in dealt]
    return [*hits, ("and the run's end", functools.partial(ended, clone))]


def hit(clone: Clone, blow: Blow, fresh: bool) -> None:
    """Start or continue the run, deal the blow, and demand that dvc.lock, as far as it goes, is the truth."""
    if fresh:
        clone.forget()
    running, order = clone.dvc("repro"), list(clone.seconds)
    reached = running.until(lambda: any(order.index(stage) >= order.index(blow.stage) for stage in running.stages))
    end = time.monotonic() + blow.after
    if reached and running.until(lambda: time.monotonic() >= end):
        deal(running, blow)
    running.process.wait(600)
    if blow.victim != "dvc":  # whose stage goes on, for the next run to wait for
        clone.no_orphans()
    differ = [stage for stage in differing(clone.lock(), clone.truth) if stage in clone.lock()]
    demand(not differ, f"dvc.lock differs in {', '.join(differ)}")


def deal(running: Running, blow: Blow) -> None:
    with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
        if blow.victim == "all":
            os.killpg(running.process.pid, blow.signal)
        elif blow.victim == "dvc":
            running.process.send_signal(blow.signal)
        else:
            stages = [
                p for p in psutil.Process(running.process.pid).children(recursive=True) if "stages." in " ".join(p.cmdline())
            ]
            for process in stages:
                process.send_signal(blow.signal)


def ended(clone: Clone) -> None:
    clone.finish()
    clone.no_orphans()


# Two at once.


def twice(clone: Clone, options) -> Trials:
    return [("pretrain@milan-0 by two `dvc repro` at once", functools.partial(at_once, clone))]


def at_once(clone: Clone) -> None:
    """Demand that both succeed, or that one says why it was refused; afterwards the results must be the truth."""
    both = [clone.dvc("repro", "-f", "-s", "pretrain@milan-0") for _ in range(2)]
    said = [running.wait() for running in both]
    good = [running.process.returncode == 0 for running in both]
    demand(any(good), f"neither ended well: {said[0][-400:]} {said[1][-400:]}")
    for text, well in zip(said, good, strict=True):
        demand(well or re.search("busy|lock", text) is not None, f"the other one does not say why it stopped: {text[-600:]}")
        demand("Traceback" not in text, f"a traceback: {text[-600:]}")
    clone.finish()


# A disk that is full.


def full_disk(clone: Clone, options) -> Trials | str:
    place = clone.folder / "full"
    place.mkdir(exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "none", place], capture_output=True).returncode:
        return "mounting a small disk (a tmpfs) needs root"
    subprocess.run(["umount", place], check=True)
    stages = {name.partition("@")[0]: name for name in clone.truth}  # of a matrix the last
    return [(name, functools.partial(fill, clone, name, place)) for name in stages.values()]


def fill(clone: Clone, stage: str, place: Path) -> None:
    """Run a stage's command with its results on a disk of half their size, and again once there is room."""
    results = {word: word.replace("/", "-") for word in places(clone, stage)}
    words = [f"full/{results[word]}" if word in results else word for word in command(clone, stage)]
    size = sum(out["size"] for out in clone.truth[stage].get("outs", [])) or (clone.folder / next(iter(results))).stat().st_size
    half = max(4096, size // 2 // 4096 * 4096)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={half}", "none", place], check=True)
    if size <= half:  # a disk has a page at least: nothing is left of it
        (place / "full").write_bytes(bytes(half))
    try:
        running = clone.start(*words)
        said = running.wait()
        demand(running.process.returncode != 0, "it ended well on a disk that holds half of its results")
        demand("full" in last_error(said), f"it does not say that the disk is full: {last_error(said)}")
        whole(clone, place, results)
        subprocess.run(["mount", "-o", "remount,size=4g", place], check=True)
        running = clone.start(*words)
        said = running.wait()
        demand(running.process.returncode == 0, f"with room it failed: {said[-600:]}")
        whole(clone, place, results, all_there=True)
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def command(clone: Clone, stage: str) -> list[str]:
    """Return the words of a stage's command behind `python`, as the stage itself fills them."""
    words = shlex.split(filled(clone.truth[stage]["cmd"], read_params(clone.folder / "params.yaml"), stage))
    return words[words.index("python") + 1 :]


def places(clone: Clone, stage: str) -> list[str]:
    """Return the paths that a stage's command writes."""
    words = command(clone, stage)
    given = {word: words[k + 1] for k, word in enumerate(words[:-1]) if word in ("--out", "--metrics", "--curve", "--confusion")}
    if "--published" in words:  # the last stages read --metrics
        given.pop("--metrics")
    return list(given.values())


def whole(clone: Clone, place: Path, results: dict[str, str], all_there: bool = False) -> None:
    """Demand that every file under a result's name equals that of the undisturbed run."""
    for original, name in results.items():
        if original.endswith(".html"):  # states times
            continue
        there, truth = place / name, clone.folder / original
        for file in filter(Path.is_file, there.rglob("*") if there.is_dir() else [there]):
            twin = truth / file.relative_to(there) if there.is_dir() else truth
            demand(dvc_hash(file) == dvc_hash(twin), f"{file.relative_to(place)} is not the undisturbed run's")
        demand(there.exists() or not all_there, f"{name} is missing")


# Bytes that changed behind DVC's back.

FLIPS = {
    "imagenet/train-00000.arrow": "pretrain@milan-0",
    "imagenet/pairs-00000.arrow": "teacher",
    "imagenet/manifest.json": "linear_eval@milan-0",
    "ade20k/train-00000.arrow": "segment@milan-0",
    "targets/features-00000.npy": "pretrain@milan-0",
    "teacher/teacher.safetensors": "extract_targets",
    "pretrain/milan-0/encoder.safetensors": "finetune@milan-0",
    "segment/milan-0/segmenter.safetensors": "figures",
}


def flips(clone: Clone, options) -> Trials:
    draw = random.Random(f"{options.seed} flips")
    return [
        (f"{name}, read by {stage}", functools.partial(flip, clone, name, stage, draw.random())) for name, stage in FLIPS.items()
    ]


def flip(clone: Clone, name: str, stage: str, where: float) -> None:
    """Flip one bit in the middle half of a file, keeping its time, and its link to DVC's cache where DVC makes links. The stage
    that reads the file must name it, and following the error's advice must mend it."""
    clone.dvc("checkout", "--relink", "-q").wait()
    path = clone.outs / name
    original, before = path.read_bytes(), path.stat()
    place = int(len(original) * (0.25 + where / 2))
    mode = before.st_mode
    path.chmod(0o644)
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(bytes([original[place] ^ 1 << place % 8]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    path.chmod(mode)
    running = clone.dvc("repro", "-f", "-s", stage)
    said = running.wait()
    demand(running.process.returncode != 0, f"{stage} read it without an error (byte {place})")
    error = last_error(said.partition("\nERROR: failed to reproduce")[0])
    demand(name in error, f"the file is not named: {error}")
    for command in re.findall("`(find .*?)`", error):
        subprocess.run(command, shell=True, cwd=clone.folder, check=True)
    clone.finish()
    demand(path.read_bytes() == original, f"{name} is not mended by the error's advice: {error}")


def cut_checkpoint(clone: Clone, options) -> Trials:
    return [("the newest state of pretrain@milan-0, cut", functools.partial(cut, clone))]


def cut(clone: Clone) -> None:
    running = clone.dvc("repro", "-f", "-s", "pretrain@milan-0")

    def states() -> list[Path]:
        return sorted(clone.folder.glob(".scratch/pretrain-milan-0-*/state-*.pt"))

    demand(running.until(lambda: len(states()) >= 2), f"no two states were saved: {running.said[-300:]}")
    os.killpg(running.process.pid, signal.SIGKILL)
    running.wait()
    newest = states()[-1]
    newest.write_bytes(newest.read_bytes()[:-1000])
    said = clone.finish("-f", "-s", "pretrain@milan-0")
    demand(f"{newest.name} is damaged" in said and "falling back" in said, f"the damage is not said: {said[-600:]}")
    demand("continuing from step" in said, f"it did not continue: {said[-600:]}")


# MLflow's store, and the clock.


def store(clone: Clone, options) -> Trials:
    return [
        ("locked by another program", functools.partial(outage, clone, locked(clone))),
        ("a server that takes 20 s for each word", functools.partial(outage, clone, slow())),
        ("a server that is gone", functools.partial(outage, clone, contextlib.nullcontext("http://127.0.0.1:9"))),
    ]


def outage(clone: Clone, trouble) -> None:
    """Demand that the stage succeeds; afterwards its run is in the store, complete and once."""
    before = len(runs(clone))
    with trouble as uri:
        clone.finish("-f", "-s", "linear_eval@milan-0", **({"MLFLOW_TRACKING_URI": uri} if uri else {}))
        time.sleep(15)
    delivered(clone, before)


def delivered(clone: Clone, before: int) -> None:
    logger = clone.start("-m", "milan.tracking.logger")
    said = logger.wait()
    left = [path.name for path in clone.folder.glob(".scratch/tracking/*.jsonl")]
    demand(logger.process.returncode == 0 and not left, f"not delivered: {left} {said[-300:]}")
    stored, metrics = runs(clone), clone.folder / "reports/metrics/smoke/linear_eval/milan-0.json"
    demand(len(stored) == before + 1, f"{len(stored) - before} runs for one stage")
    top1 = json.loads(metrics.read_text())["linear_eval/top1"]
    demand(stored[-1] == ("FINISHED", top1), f"the store has {stored[-1]}, the stage's result is {top1}")


def runs(clone: Clone) -> list[tuple[str, float]]:
    """Return (status, linear_eval/top1) of the runs of linear_eval milan 0, the newest last."""
    query = """select status, value from runs left join latest_metrics on latest_metrics.run_uuid = runs.run_uuid
        and key = 'linear_eval/top1' where name = 'linear_eval milan seed 0' order by start_time"""
    with contextlib.closing(sqlite3.connect(clone.folder / "mlflow.db")) as base:
        return base.execute(query).fetchall()


@contextlib.contextmanager
def locked(clone: Clone) -> Iterator[None]:
    with contextlib.closing(sqlite3.connect(clone.folder / "mlflow.db", isolation_level=None, timeout=60)) as base:
        base.execute("begin exclusive")
        yield
        base.execute("rollback")


@contextlib.contextmanager
def slow() -> Iterator[str]:
    class Sleeper(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            time.sleep(20)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Sleeper) as server:
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


JUMPY = """import random, time
now, now_ns = time.time, time.time_ns
jump = lambda: random.Random(now_ns() // 10**9).choice([-86400, 0, 3600])
time.time = lambda: now() + jump()
time.time_ns = lambda: now_ns() + jump() * 10**9
"""


def clock(clone: Clone, options) -> Trials:
    return [("every second to yesterday, today or an hour ahead", functools.partial(jumps, clone))]


def jumps(clone: Clone) -> None:
    """Run a stage with a jumping clock: Python imports sitecustomize.py in DVC, the stage and its logger."""
    folder = clone.folder / ".scratch/clock"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(JUMPY)
    before = len(runs(clone))
    clone.finish("-f", "-s", "linear_eval@milan-0", PYTHONPATH=str(folder))
    logger = clone.start("-m", "milan.tracking.logger")
    demand(logger.wait() == "" and len(runs(clone)) == before + 1, f"MLflow: {logger.said[-300:]}")


FAULTS = {
    "kill": functools.partial(interruptions, signal.SIGKILL, 1.0),
    "term": functools.partial(interruptions, signal.SIGTERM, 0.25),
    "ctrl-c": functools.partial(interruptions, signal.SIGINT, 0.25),
    "twice": twice,
    "full-disk": full_disk,
    "flip": flips,
    "cut-checkpoint": cut_checkpoint,
    "store": store,
    "clock": clock,
}
