"""Several nodes: the head, where DVC and the stages run, calls; the others, which wait in the same shared folder
(milan/training/follow.py), come and run their part of the processes.

What they have to say to each other lies in .scratch/nodes/<launch>/, and goes when the launch is over: call.json (what
to run and where to meet), node-1, node-2, ... (who took which place), alive-<node> (touched every second or so) and the
words of processes that failed, <kind>-<rank>.json. Ages are differences of the file server's times, never of two clocks.
"""

import contextlib
import json
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from milan.core.errors import UserError
from milan.core.files import SCRATCH, read_json, write_json

NODES = SCRATCH / "nodes"
LOOK_SECONDS = 1.0  # between two looks at what the others say
WAIT_SECONDS = 600.0  # that a head waits for missing nodes,
QUIET_SECONDS = 5.0  # and says nothing of it at first,
TELL_SECONDS = 15.0  # then a line so often
FRESH_SECONDS = 15.0  # since a head's last sign of life, within which its call is answered
LOST_SECONDS = 120.0  # without a sign of life, after which a node is lost


@dataclass(frozen=True)
class Call:
    """What a head asks of the other nodes: to run module.function in so many processes each, which meet at its address."""

    launch: str
    module: str
    function: str
    kind: str
    processes: int
    nodes: int
    address: str
    port: int

    @property
    def folder(self) -> Path:
        return NODES / self.launch


def read_call(path: Path) -> Call:
    """Raises UserError for anything but a head's call, and where there is none."""
    kinds = {field.name: field.type for field in fields(Call)}
    found = read_json(path, **kinds)
    return Call(**{name: found[name] for name in kinds})


@contextlib.contextmanager
def called(function: Callable, kind: str, processes: int, nodes: int) -> Iterator[Call]:
    """Call the other nodes and wait for them; at the end their processes end too, for the launch's folder goes.

    Raises UserError when too few came within WAIT_SECONDS."""
    module = sys.modules["__main__"].__spec__.name if function.__module__ == "__main__" else function.__module__
    about = {"module": module, "function": function.__name__, "kind": kind, "processes": processes, "nodes": nodes}
    call = Call(f"{time.time_ns()}-{os.getpid()}", **about, address=address(), port=free_port())
    try:
        gather(call)
        forget_the_dead(call)
        yield call
    finally:
        shutil.rmtree(call.folder, ignore_errors=True)


def address() -> str:
    """The name by which other nodes reach this one."""
    return os.environ.get("MILAN_ADDRESS") or socket.gethostname()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


def gather(call: Call) -> None:
    """Wait until every place is taken, with a line now and then."""
    began = time.monotonic()
    told = began - TELL_SECONDS + QUIET_SECONDS
    while True:
        write_json(call.folder / "call.json", asdict(call))  # again and again: a sign of life
        here = comers(call)
        if len(here) == call.nodes - 1:
            break
        said = f"{len(here)} of {call.nodes - 1} other nodes are here ({', '.join(here) or 'none'})"
        if time.monotonic() - began > WAIT_SECONDS:
            raise UserError(
                f"{said} after {WAIT_SECONDS:.0f} s. Start `python -m milan.training.follow` in this folder on each node but this one, "
                f"or set runtime.nodes={1 + len(here)}."
            )
        if time.monotonic() - told >= TELL_SECONDS:
            print(f"{call.module}: waiting for nodes: {said}.", file=sys.stderr, flush=True)
            told = time.monotonic()
        time.sleep(LOOK_SECONDS)


def forget_the_dead(call: Call) -> None:
    """Remove what heads that were killed left behind."""
    for path in NODES.glob("*/call.json"):
        with contextlib.suppress(FileNotFoundError):
            if min(age(other, call.folder / "call.json") for other in path.parent.iterdir()) > 10 * LOST_SECONDS:
                shutil.rmtree(path.parent, ignore_errors=True)


def comers(call: Call) -> list[str]:
    """The names of the nodes that took a place."""
    look_again(call.folder)
    return [path.read_text() for place in range(1, call.nodes) if (path := call.folder / f"node-{place}").exists()]


def look_again(folder: Path) -> None:
    """Change a folder, so that a network file system shows what others changed in it; it may show what it remembers."""
    with tempfile.NamedTemporaryFile(dir=folder):
        pass


def age(path: Path, now: Path) -> float:
    """Seconds by which a file or folder was touched before `now`, which was touched just now."""
    return now.stat().st_mtime - path.stat().st_mtime


def open_calls(mine: Path, joined: set[str]) -> Iterator[Call]:
    """The calls of heads that live and wait, the newest first. mine: a file that was touched just now."""
    look_again(NODES)
    for path in sorted(NODES.glob("*/call.json"), reverse=True):
        with contextlib.suppress(FileNotFoundError, UserError):  # the launch ended meanwhile, or it is no head's
            if path.parent.name not in joined and age(path, mine) < FRESH_SECONDS:
                yield read_call(path)


def take_place(call: Call) -> int | None:
    """A place in the launch, this node's alone; None when all are taken."""
    for place in range(1, call.nodes):
        with contextlib.suppress(FileExistsError, FileNotFoundError), open(call.folder / f"node-{place}", "x") as file:
            file.write(socket.gethostname())
            return place
    return None


def leave_word(folder: Path, kind: str, who: int | str, text: str) -> None:
    """Say why a process failed, unless the launch is over."""
    with contextlib.suppress(OSError):
        part = folder / f"{kind}-{who}.part"
        part.write_text(json.dumps(text))
        os.replace(part, part.with_suffix(".json"))


def words(folder: Path, kind: str) -> list[str]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"{kind}-*.json"))]


def failed(folder: Path) -> bool:
    return any(words(folder, kind) for kind in ("user", "crash", "lost"))


class Watch(threading.Thread):
    """Signs of life of this node; and the end of this process when the launch is over, when a process of any node failed
    (on GPUs the others would wait for it in vain), or when a node gives no sign of life."""

    def __init__(self, folder: Path, node: int, nodes: int, rank: int):
        super().__init__(daemon=True)
        self.folder, self.rank, self.left = folder, rank, threading.Event()
        self.mine = folder / f"alive-{node}"
        self.others = {folder / f"alive-{other}": False for other in range(nodes) if other != node}  # was it ever there?
        self.mine.touch()
        self.began = self.mine.stat().st_mtime

    def run(self) -> None:
        while not self.left.wait(LOOK_SECONDS):
            try:
                os.utime(self.mine)
                if failed(self.folder):
                    os._exit(1)
                for path in self.others:
                    self.look_at(path)
            except FileNotFoundError:
                os._exit(1)  # the launch is over

    def look_at(self, path: Path) -> None:
        now = self.mine.stat().st_mtime
        try:
            last = path.stat().st_mtime
            self.others[path] = True
        except FileNotFoundError:
            last = now if self.others[path] else self.began  # one that was there has done its part
        if now - last > LOST_SECONDS:
            leave_word(self.folder, "lost", self.rank, f"{path.name.replace('alive', 'node')}: no sign of life")
            os._exit(1)

    def leave(self) -> None:
        """This node has done its part."""
        self.left.set()
        self.join()
        self.mine.unlink(missing_ok=True)
