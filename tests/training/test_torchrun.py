"""Ranks that torchrun started: alone (forked from here, which spares the import of torch), and under two torchruns that meet
on the loopback as two nodes.

Run as a script, this file is a stage in small, for torchrun to start."""

import datetime
import io
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.run import main as torchrun

from milan.core.errors import PREEMPTED, Preempted, UserError
from milan.core.files import write_json
from milan.core.program import fail
from milan.params import AblationRow
from milan.stage import preempt
from milan.training import distributed
from tests.conftest import ROOT
from tests.training.test_loop import COMPUTE, Points, assert_same, patient, pretrain, settings, train, without_recipe

MILAN = AblationRow("clip", "prompt", "semantic")
OPTIONS = {"epochs": 2, "lr": 1e-3}
LOST = "error: A training process was lost"

# The stage in small, and what it launches.


@dataclass
class Harm:
    """At the first sample of an epoch one rank is killed or frozen, or its torchrun asked to stop. From then on samples are slow, so
    that the news comes before the end."""

    epoch: int
    rank: int
    number: int

    def __call__(self, epoch: int, index: int) -> None:
        if epoch == self.epoch and self.number and distributed.rank() == self.rank:
            number, self.number = self.number, 0
            os.kill(os.getppid() if number == signal.SIGTERM else os.getpid(), number)
        time.sleep(0.02 if epoch >= self.epoch else 0)


def noted_pretrain() -> dict:
    Path(f"rank-{distributed.rank()}").touch()
    return pretrain(MILAN, settings(**OPTIONS))


def harmed_train(*harm: int) -> dict:
    return train(Points(Harm(*harm)), patient(settings()) if harm[2] == signal.SIGTERM else settings())


def mistaken(rank: int) -> dict:
    if distributed.rank() == rank:
        raise UserError("the moon is full: wait a week")
    distributed.barrier()
    return {}


def harmed_computation(*harm: int) -> dict:
    """Outside training: no process waits for another."""
    distributed.barrier()
    Harm(*harm)(0, 0)
    for _ in range(3000):
        time.sleep(0.01)
    return {}


def launched_nothing() -> dict:
    return {"launched": False}


def stage(function: Callable[..., dict], *words: int) -> None:
    """Do what milan/stage.py does around a launch."""
    with distributed.torchrun():
        signal.signal(signal.SIGTERM, preempt)
        Path(f"stage-{os.environ['RANK']}").touch()
        try:
            params = SimpleNamespace(compute=COMPUTE)
            if function is not launched_nothing:
                write_json(Path("result.json"), distributed.launch(without_recipe, params, function, *words))
        except UserError as error:
            fail(str(error))
        except Preempted:
            fail("Stopped.", PREEMPTED)


if __name__ == "__main__":
    from tests.training import test_torchrun  # where what is launched has a name on every rank

    stage(getattr(test_torchrun, sys.argv[1]), *map(int, sys.argv[2:]))


# Processes with a log each.


def logged(log: Path, function: Callable, *arguments) -> None:
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(number, "w", closefd=False), write_through=True) for number in (1, 2))
    function(*arguments)


class Processes:
    """Forked processes."""

    def __init__(self):
        self.processes, self.logs = [], []

    def fork(self, function: Callable, *arguments) -> None:
        self.logs.append(Path(f"log-{len(self.logs)}"))
        process = multiprocessing.get_context("fork").Process(target=logged, args=(self.logs[-1], function, *arguments))
        process.start()
        self.processes.append(process)

    def statuses(self) -> list[int | None]:
        """Wait, but for no more than a minute, and return the exit statuses."""
        for process in self.processes:
            process.join(60)
        return [process.exitcode for process in self.processes]

    def said(self, process: int) -> str:
        """Return a log in one line."""
        return " ".join(self.logs[process].read_text().split())

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_) -> None:
        for process in self.processes:
            process.kill()  # what it started ends with it


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(autouse=True)
def project_folder(workplace, monkeypatch) -> None:
    """Work in an empty folder, the project's on all nodes."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    distributed.torchrun_store.cache_clear()


# Ranks alone.


def as_rank(rank: int, world: int, port: int, function: Callable, *words: int) -> None:
    """Run the stage in small as torchrun would start it, one process a node."""
    about = {"RANK": rank, "GROUP_RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    about |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    os.environ.update({name: str(value) for name, value in about.items()})
    stage(function, *words)


class Ranks(Processes):
    """Two ranks on two nodes, and the store of their torchruns."""

    def __init__(self, function: Callable, *words: int):
        super().__init__()
        port = free_port()
        for rank in range(2):
            self.fork(as_rank, rank, 2, port, function, *words)
        self.store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)


def test_a_stage_that_launches_nothing_ends_on_every_rank():
    with Ranks(launched_nothing) as ranks:
        assert ranks.statuses() == [0, 0]
    assert Path("stage-0").exists() and not Path("stage-1").exists()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_rank_ends_the_other_which_says_so(victim):
    with Ranks(harmed_train, 2, victim, signal.SIGKILL) as ranks:
        assert ranks.statuses()[1 - victim] == 1
    assert [ranks.said(rank).count(LOST) for rank in (victim, 1 - victim)] == [0, 1]
    assert not Path("result.json").exists()


def test_a_silent_rank_is_lost_after_torch_s_timeout(monkeypatch):
    """As when a machine hangs: no connection breaks."""
    monkeypatch.setattr("torch.distributed.distributed_c10d.default_pg_timeout", datetime.timedelta(seconds=2))
    with Ranks(harmed_train, 2, 1, signal.SIGSTOP) as ranks:
        ranks.processes[0].join(60)
        assert ranks.processes[0].exitcode == 1
    assert ranks.said(0).count(LOST) == 1 and "imed out" in ranks.said(0)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_user_error_is_rank_0_s_to_say(rank):
    with Ranks(mistaken, rank) as ranks:
        assert ranks.statuses() == [1, 1]
    assert ranks.said(0) == "error: the moon is full: wait a week"
    assert "error" not in ranks.said(1)


def test_a_fault_on_another_rank_keeps_its_traceback():
    with Ranks(mistaken, 1, 2) as ranks:
        assert ranks.statuses() == [1, 1]
    assert "RuntimeError: Traceback (most recent call last):" in ranks.said(0)
    assert ranks.said(0).endswith("TypeError: mistaken() takes 1 positional argument but 2 were given")


def test_a_rank_that_fails_before_it_joins_is_not_waited_for(monkeypatch):
    """As on a node whose GPU torch does not see."""
    resolve = distributed.resolve_device
    monkeypatch.setattr(
        distributed, "resolve_device", lambda c: torch.device("cuda") if os.environ["RANK"] == "1" else resolve(c)
    )
    with Ranks(mistaken, 0) as ranks:
        assert ranks.statuses() == [1, 1]
    name = socket.gethostname()
    assert ranks.said(0) == f"error: Rank 0 computes on cpu, and {name} on cuda: mend its driver, or set compute.device."


@pytest.mark.parametrize("gpus", [0, 1])
def test_a_node_with_fewer_gpus_than_processes_is_named(monkeypatch, gpus):
    monkeypatch.setattr(distributed, "resolve_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match=f"2 processes were started on {socket.gethostname()}, which has {gpus} GPU"):
        distributed.check_devices("cuda", COMPUTE)


def test_a_rank_that_never_comes_is_said(monkeypatch):
    monkeypatch.setattr(distributed, "START_WAIT", datetime.timedelta(seconds=1))
    monkeypatch.setattr(distributed, "take_part", lambda: None)
    with Ranks(mistaken, 0) as ranks:
        assert ranks.statuses() == [1, 0]
    assert ranks.said(0).endswith("error: Of ranks 0 to 1, these did not start within 1 s: 1. The logs of their nodes say why.")


def test_a_rank_whose_head_is_gone_ends(monkeypatch):
    monkeypatch.setattr(distributed, "CONNECT_WAIT", datetime.timedelta(seconds=1))
    with Processes() as ranks:
        ranks.fork(as_rank, 1, 2, free_port(), mistaken, 0)
        assert ranks.statuses() == [1]
    assert "error: The node of rank 0 has ended, or cannot be reached: " in ranks.said(0)


# Under torchrun.


class Torchruns(Processes):
    """Nodes of so many processes each."""

    def __init__(self, *stage: object, nodes: int = 2, processes: int = 1, worker: bool = False):
        """worker: the second node runs milan.training.worker instead of the stage."""
        super().__init__()
        about = [f"--nnodes={nodes}", f"--nproc-per-node={processes}", f"--master-port={free_port()}", "--master-addr=127.0.0.1"]
        for node in range(nodes):
            module = ["milan.training.worker"] if worker and node else ["tests.training.test_torchrun", *map(str, stage)]
            self.fork(torchrun, [*about, f"--node-rank={node}", "-m", *module])


def test_two_nodes_make_what_one_process_makes():
    """Two processes on each; only rank 0 is a stage, and only it writes."""
    with Torchruns("noted_pretrain", processes=2, worker=True) as nodes:
        assert nodes.statuses() == [0, 0]
    assert_same(pretrain(MILAN, settings(name="alone", **OPTIONS)), json.loads(Path("result.json").read_text()))
    written = {path.name for path in Path().iterdir()} - {".scratch", "log-0", "log-1"}
    assert written == {"result.json", "stage-0", "rank-0", "rank-1", "rank-2", "rank-3"}


def test_a_lost_node_ends_the_other_and_one_node_goes_on():
    with Torchruns("harmed_train", 2, 1, int(signal.SIGKILL)) as nodes:
        assert nodes.statuses() == [1, 1]
    assert nodes.said(0).count(LOST) == 1 and LOST not in nodes.said(1)
    assert settings().saved.load()["step"] >= 6
    assert_same(train(Points(), settings(name="undisturbed")), train(Points(), settings()))


def test_a_sigterm_to_one_torchrun_saves_and_one_node_goes_on():
    """Nothing was due to be saved for an hour."""
    with Torchruns("harmed_train", 1, 1, int(signal.SIGTERM)) as nodes:
        assert nodes.statuses() == [1, 1]
    assert nodes.said(0).count("saved. error: Stopped.") == 1 and LOST not in nodes.said(0) + nodes.said(1)
    assert len(settings().saved.saves()) == 1
    assert_same(train(Points(), settings(name="undisturbed")), train(Points(), patient(settings())))


@pytest.mark.parametrize("number, said", [(signal.SIGKILL, LOST), (signal.SIGTERM, "error: Stopped.")])
def test_outside_training_a_killed_process_is_no_preemption(number, said):
    """Rank 0 gets a SIGTERM in both cases: torchrun also sends it when another process of its node ends."""
    with Torchruns("harmed_computation", 0, 1, int(number), nodes=1, processes=2) as nodes:
        assert nodes.statuses() == [1]
    assert nodes.said(0).count("error: ") == nodes.said(0).count(said) == 1
