"""A node that follows: it waits for the launches of the head, the node where DVC runs, and takes its part in each.

    python -m milan.training.follow          # on every node but the head, in the same shared folder; before or after `dvc repro`
    python -m milan.training.follow --end    # on any node, when DVC has ended: those that wait go home

It writes nothing but its part of shared work (shards of the target bank): no outs, metrics, MLflow runs. A SIGTERM or
Ctrl-C asks the whole launch to save and to end, as on the head.
"""

import argparse
import importlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from milan.core.errors import UserError
from milan.core.files import refusals_said
from milan.core.parallel import end_with
from milan.core.program import fail
from milan.training import nodes
from milan.training.nodes import NODES, Call


def follow() -> None:
    """Take part in every launch until told to end: by `--end`, or by a signal."""
    mine, joined = NODES / f"follower-{socket.gethostname()}-{os.getpid()}", set()
    NODES.mkdir(parents=True, exist_ok=True)
    mine.touch()
    signals = Signals()
    say(f"waiting in {Path.cwd()}")
    while not signals.came and touched(mine):
        for call in nodes.open_calls(mine, joined):
            place = nodes.take_place(call)
            if place is not None:
                joined.add(call.launch)
                take_part(call, place, signals)
                break
        time.sleep(nodes.LOOK_SECONDS)
    mine.unlink(missing_ok=True)
    say("done")


def touched(path: Path) -> bool:
    try:
        os.utime(path)
    except OSError:
        return False
    return True


def say(text: str) -> None:
    print(f"follow {socket.gethostname()}: {text}", flush=True)


class Signals:
    """Notes SIGTERM and SIGINT, and passes them on to a launch that this node takes part in."""

    def __init__(self):
        self.came, self.launch = False, None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.note)

    def note(self, *_) -> None:
        self.came = True
        if self.launch:
            call, place, process = self.launch
            nodes.leave_word(call.folder, "stopped", f"node-{place}", "a signal")
            process.terminate()


def take_part(call: Call, place: int, signals: Signals) -> None:
    """In a process of its own: what stages and libraries leave behind, and edits of the code, do not matter to the next."""
    say(f"{call.module} as node {place} of {call.nodes}")
    signals.launch = call, place, started(call, place)
    if signals.came:
        signals.note()
    status = signals.launch[2].wait()
    signals.launch = None
    if status:
        nodes.leave_word(call.folder, "lost", f"node-{place}", f"{socket.gethostname()} left with status {status}")
    say(f"{call.module}: {'done' if status == 0 else 'ended early; the head says why'}")


def started(call: Call, place: int) -> subprocess.Popen:
    """In a session of its own: a signal to this node's whole group must not reach processes that have to save."""
    command = [sys.executable, "-m", "milan.training.follow", "--join", call.launch, "--place", str(place)]
    return subprocess.Popen(command, start_new_session=True)


def join(launch: str, place: int) -> None:
    """This node's processes of a launch, to their end. What goes wrong is left for the head to say; UserError without one."""
    from milan.training import distributed

    end_with(os.getppid())
    call = nodes.read_call(NODES / launch / "call.json")
    where = distributed.Place(call.folder, call.kind, call.processes, place, call.nodes, call.address, call.port)
    try:
        distributed.on_this_node(getattr(importlib.import_module(call.module), call.function), None, where)
    except Exception as error:
        if not nodes.failed(call.folder):
            nodes.leave_word(call.folder, "user" if isinstance(error, UserError) else "crash", f"node-{place}", str(error))
        sys.exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--end", action="store_true", help="tell all nodes that wait to end")
    parser.add_argument("--join", metavar="LAUNCH", help=argparse.SUPPRESS)
    parser.add_argument("--place", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.join and args.place is None:
        parser.error("--join needs --place")
    try:
        with refusals_said():
            act(args)
    except UserError as error:
        fail(str(error))


def act(args: argparse.Namespace) -> None:
    if args.end:
        for path in NODES.glob("follower-*"):
            path.unlink(missing_ok=True)
    elif args.join:
        join(args.join, args.place)
    else:
        follow()


if __name__ == "__main__":
    main()
