"""Two nodes: two trees of processes that share a folder and meet over the loopback, as head and follower."""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch

from milan.core.errors import PREEMPTED, UserError
from milan.training import distributed, follow, nodes
from milan.training.nodes import NODES
from tests.training.test_loop import Points, assert_same, launched, patient, rank_of, settings, train


class Forked:
    """What follow.started gives, forked from here, which spares the import of torch."""

    def __init__(self, call: nodes.Call, place: int):
        self.process = multiprocessing.get_context("fork").Process(target=join, args=(call.launch, place))
        self.process.start()
        self.terminate = self.process.terminate

    def wait(self) -> int:
        self.process.join()
        return self.process.exitcode


def join(launch: str, place: int) -> None:
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    follow.join(launch, place)


@pytest.fixture
def lan(workplace, monkeypatch) -> Path:
    """An empty folder whose nodes look for each other often."""
    monkeypatch.setenv("MILAN_ADDRESS", "127.0.0.1")
    monkeypatch.setattr("milan.training.nodes.LOOK_SECONDS", 0.05)
    monkeypatch.setattr("milan.training.follow.started", Forked)
    return workplace


@pytest.fixture
def follower(lan) -> Iterator[multiprocessing.Process]:
    """A node that follows, in a process of its own."""
    process = multiprocessing.get_context("fork").Process(target=follow.follow)
    process.start()
    yield process
    process.kill()
    process.join()


def whereabouts(word: str) -> dict:
    """What the follower was sent, and how many it makes with the head."""
    ranks = distributed.total(torch.tensor([1.0, distributed.rank()])).tolist()
    word += str(distributed.rank())
    Path(word).touch()
    return {"word": word, "ranks": ranks}


def test_arguments_come_from_the_head_and_its_word_counts(follower):
    """Four processes on two nodes: ranks 0 + 1 + 2 + 3."""
    assert launched(2, whereabouts, "by ", nodes=2) == {"word": "by 0", "ranks": [4, 6]}
    assert sorted(path.name for path in Path().glob("by *")) == ["by 0", "by 1", "by 2", "by 3"]
    assert not list(NODES.glob("*/")) or [path.name for path in NODES.iterdir()] == [
        f"follower-{os.uname().nodename}-{follower.pid}"
    ]
    assert launched(1, whereabouts, "again ", nodes=2) == {"word": "again 0", "ranks": [2, 1]}


def test_two_nodes_make_what_one_makes(follower):
    alone = train(Points(), settings(name="alone"))
    assert_same(alone, launched(1, train, Points(), settings(), nodes=2))


@dataclass
class Harm:
    """To be sent to another node: at the first sample of an epoch, one rank kills, signals or freezes a process; from there
    on samples are slow, so that what was done comes round before the end."""

    epoch: int
    rank: int
    deed: str
    whom: int = 0  # 0: the launcher of that rank

    def __call__(self, epoch: int, index: int) -> None:
        if epoch == self.epoch and self.deed and rank_of(self.rank):
            deed, self.deed = self.deed, ""
            {"kill": kill, "ask": ask, "freeze": freeze}[deed](self.whom or os.getppid())
        time.sleep(0.02 if epoch >= self.epoch else 0)


def kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)


def ask(process: int) -> None:
    os.kill(process, signal.SIGTERM)


def family(process: int) -> list[psutil.Process]:
    return [*psutil.Process(process).children(recursive=True), psutil.Process(process)]


def freeze(process: int) -> None:
    """As a machine that hangs: no connection breaks."""
    for member in family(process):
        member.suspend()


def test_a_lost_follower_is_said_and_one_node_goes_on(follower):
    whole = train(Points(), settings(name="undisturbed"))
    with pytest.raises(UserError, match="process was lost.*run `dvc repro` again"):
        launched(1, train, Points(Harm(2, 1, "kill", follower.pid)), settings(), nodes=2)
    assert settings().scratch.load()["step"] >= 6
    assert not list(NODES.glob("*/call.json"))
    assert_same(whole, train(Points(), settings()))


def in_a_child(*arguments) -> None:
    launched(1, *arguments, nodes=2)


@pytest.mark.parametrize("who", ["head", "follower"])
def test_a_signal_to_either_node_saves_and_ends_both(follower, who):
    """Nothing was due to be saved for an hour. The head ends with 75; a follower that got the signal goes home."""
    whole, run = train(Points(), settings(name="undisturbed")), patient(settings())
    slow = Points(Harm(1, 0, "ask", 0 if who == "head" else follower.pid))
    child = multiprocessing.get_context("fork").Process(target=in_a_child, args=(train, slow, run))
    child.start()
    child.join(90)
    assert child.exitcode == PREEMPTED
    assert len(run.scratch.saves()) == 1
    assert_same(whole, train(Points(), run))
    if who == "follower":
        follower.join(30)
        assert follower.exitcode == 0


def fault_in_one(place: int, error: Exception) -> dict:
    if rank_of(place):
        raise error
    distributed.barrier()
    return {}


def test_a_mistake_on_the_other_node_is_the_head_s_to_say(follower):
    with pytest.raises(UserError, match="^the moon is full: wait a week$"):
        launched(1, fault_in_one, 1, UserError("the moon is full: wait a week"), nodes=2)
    with pytest.raises(RuntimeError, match="(?s)Traceback.*in fault_in_one.*ZeroDivisionError: a fault"):
        launched(1, fault_in_one, 1, ZeroDivisionError("a fault"), nodes=2)
    assert follower.is_alive()
    assert launched(1, whereabouts, "still ", nodes=2)["ranks"] == [2, 1]


def test_a_silent_node_is_lost(lan, monkeypatch):
    monkeypatch.setattr("milan.training.nodes.LOST_SECONDS", 1.0)
    process = multiprocessing.get_context("fork").Process(target=follow.follow)
    process.start()
    try:
        with pytest.raises(UserError, match=r"process was lost \(node-1: no sign of life\)"):
            launched(1, train, Points(Harm(2, 0, "freeze", process.pid)), settings(), nodes=2)
    finally:
        for member in family(process.pid):
            member.kill()
        process.join()
    assert settings().scratch.load()["step"] == 6


def test_missing_nodes_are_waited_for_and_then_said(follower, monkeypatch, capfd):
    monkeypatch.setattr("milan.training.nodes.WAIT_SECONDS", 1.0)
    monkeypatch.setattr("milan.training.nodes.QUIET_SECONDS", 0.2)
    with pytest.raises(UserError) as error:
        launched(1, whereabouts, "never ", nodes=3)
    said = f"1 of 2 other nodes are here ({os.uname().nodename})"
    assert said in str(error.value) and "python -m milan.training.follow" in str(error.value) and "runtime.nodes=2" in str(error.value)
    assert "tests.training.test_loop: waiting for nodes: " in capfd.readouterr().err
    assert not list(Path().glob("never *")) and not list(NODES.glob("*/call.json"))


def test_the_call_of_a_killed_head_is_not_answered(lan):
    """Its last sign of life is older than a living head's would be."""
    call = nodes.Call("1-2", "tests.training.test_nodes", "whereabouts", "cpu", 1, 2, "127.0.0.1", 9)
    nodes.write_json(call.folder / "call.json", vars(call))
    mine = NODES / "follower-here-1"
    mine.touch()
    assert [found.launch for found in nodes.open_calls(mine, set())] == ["1-2"]
    assert list(nodes.open_calls(mine, {"1-2"})) == []
    old = time.time() - nodes.FRESH_SECONDS - 5
    os.utime(call.folder / "call.json", (old, old))
    assert list(nodes.open_calls(mine, set())) == []
    os.utime(call.folder / "call.json", (old - 9999, old - 9999))
    os.utime(mine)
    living = nodes.Call("3-4", "m", "f", "cpu", 1, 1, "127.0.0.1", 9)
    nodes.gather(living)
    nodes.forget_the_dead(living)
    assert sorted(path.name for path in NODES.iterdir()) == ["3-4", "follower-here-1"]


def test_a_place_is_taken_once(lan):
    call = nodes.Call("1-2", "m", "f", "cpu", 1, 3, "127.0.0.1", 9)
    call.folder.mkdir(parents=True)
    assert [nodes.take_place(call) for _ in range(3)] == [1, 2, None]
    assert nodes.comers(call) == [os.uname().nodename] * 2
    call.folder.joinpath("node-1").unlink()
    assert nodes.take_place(call) == 1


def test_followers_go_home_when_told(follower, monkeypatch):
    while not list(NODES.glob("follower-*")):
        time.sleep(0.02)
    monkeypatch.setattr("sys.argv", ["follow", "--end"])
    follow.main()
    follower.join(30)
    assert follower.exitcode == 0


@pytest.mark.parametrize("words, said", [
    ([], ".scratch"),
    (["--join", "junk", "--place", "1"], "call.json is missing"),
    (["--join", "broken", "--place", "1"], "call.json is damaged"),
])  # fmt: skip
def test_a_mistake_is_said(lan, monkeypatch, capsys, words, said):
    monkeypatch.setattr("milan.training.follow.end_with", lambda _: None)
    if words:
        (NODES / "broken").mkdir(parents=True)
        (NODES / "broken" / "call.json").write_text('{"launch": "broken"}')
    else:
        Path(".scratch").touch()
    monkeypatch.setattr("sys.argv", ["follow", *words])
    with pytest.raises(SystemExit) as ended:
        follow.main()
    assert ended.value.code == 1 and said in capsys.readouterr().err


def test_a_call_that_is_none_is_passed_over(lan):
    (NODES / "broken").mkdir(parents=True)
    (NODES / "broken" / "call.json").write_text('{"launch": "broken"}')
    (NODES / "mine").touch()
    assert list(nodes.open_calls(NODES / "mine", set())) == []
