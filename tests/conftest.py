"""Shared fixtures and helpers: the committed recipe as a tree to change, an empty working folder, and children that are forked
from the test process, because starting a child that imports torch anew takes ten seconds."""

import argparse
import copy
import io
import json
import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # `make test` runs three processes, in each of which torch would use all cores

import torch  # noqa: E402
import yaml  # noqa: E402

from milan.core.identity import Identity  # noqa: E402
from milan.data import records  # noqa: E402
from milan.params import Params  # noqa: E402
from milan.stage import Stage  # noqa: E402
from milan.training.resume import SavedState  # noqa: E402
from tests.recipes import composed  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
SLOWEST = ("test_pipeline.py", "test_rehearsal.py")
SLOW = (  # files, or tests, that run stages, servers or processes: `make test-fast` leaves them out
    "convert/test_released_weights.py",
    "core/test_mending.py",
    "core/test_parallel.py::test_no_worker_outlives_a_killed_parent",
    "report/test_browser.py",
    "report/test_readme.py::test_the_plan_is_what_the_planner_says",
    "report/test_text.py::test_a_class_s_name_does_not_run_on_dvc_s_page",
    "serve/test_serving.py",
    "stages/test_offline.py",
    "stages/test_own_images.py",
    "stages/test_pipeline.py",
    "stages/test_rehearsal.py",
    "stages/test_stage.py",
    "stages/test_torture.py",
    "stages/test_variants.py",
    "teacher/test_frozen.py::test_features_are_timm_s_without_registers",
    "test_benchmarks.py",
    "test_export.py",
    "test_fuzz.py",
    "test_golden.py::test_stored_numbers_of_the_original",
    "test_plan.py::test_the_command",
    "tracking/test_stores.py",
    "tracking/test_tracker.py::test_an_outage_keeps_all_events_and_is_logged",
    "training/test_processes.py",
    "training/test_torchrun.py::test_two_nodes_make_what_one_process_makes",
    "training/test_torchrun.py::test_a_lost_node_ends_the_other_and_one_node_goes_on",
    "training/test_torchrun.py::test_a_sigterm_to_one_torchrun_saves_and_one_node_goes_on",
    "training/test_torchrun.py::test_outside_training_a_killed_process_is_no_preemption",
)

# The first backward pass counts the devices. Later than a FakeTensorMode, which pretends a GPU, it would start a thread for
# that one, and no process forked from here could train.
torch.ones(1, requires_grad=True).backward()


def pytest_collection_modifyitems(items: list) -> None:
    """Mark the slow tests. Sort the longest files first, so that no process is left alone with one at the end."""
    for item in items:
        place = f"{item.path.relative_to(ROOT / 'tests').as_posix()}::{getattr(item, 'originalname', item.name)}"
        if any(place == entry or place.startswith(f"{entry}::") for entry in SLOW):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: (*SLOWEST, item.path.name).index(item.path.name))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Lower the priority of the test processes that do not run the longest file, for the same reason."""
    if "PYTEST_XDIST_WORKER" in os.environ and item.path.name != SLOWEST[0] and os.nice(0) == 0:
        os.nice(5)


@pytest.fixture(scope="session")
def committed_tree() -> dict:
    return yaml.safe_load((ROOT / "params.yaml").read_text())


@pytest.fixture(scope="session")
def trained_teacher_tree() -> dict:
    tree = composed("demo_teacher")
    tree["scale"] = tree["data"]["name"] = "demo"
    return tree


@pytest.fixture
def tree(trained_teacher_tree) -> dict:
    """Return a copy of the demo's recipe with a teacher that is trained here, to be changed."""
    return copy.deepcopy(trained_teacher_tree)


def change(tree: dict, key: str, value) -> None:
    """Set the value at a dotted key of a tree."""
    *sections, last = key.split(".")
    for section in sections:
        tree = tree[section]
    tree[last] = value


def write_split(folder: Path, split: str, rows: list[dict], shard_images: int) -> dict:
    """Write rows as the shards of a split and return its entry for the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = {name for row in rows for name in row}
    shards = [
        records.write_shard(folder / f"{split}-{k:05d}.arrow", chunk, columns) for k, chunk in enumerate(records.chunks(rows, shard_images))
    ]
    return {"images": len(rows), "shards": shards}


@pytest.fixture
def one_thread():
    """Use one thread, for tests that fork: OpenMP's threads do not survive a fork."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def workplace(tmp_path, monkeypatch, one_thread) -> Path:
    """Change to an empty folder, so that .scratch and every other relative path lies there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def saved_state(name: str = "stage", recipe: str = "recipe", code: dict[str, str] | None = None) -> SavedState:
    """Return the saved state of a training of this recipe."""
    return SavedState(name, Identity({"recipe": recipe}), code or {"milan/a.py": "1"})


def forked(function: Callable, *arguments) -> int:
    """Run function(*arguments) in a forked child and return its exit status, negative for the signal that ended it."""
    child = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    child.start()
    child.join(90)
    assert child.exitcode is not None, child.kill() or "the child did not end"
    return child.exitcode


def run_main(module, p: Params, out: Path, metrics: Path, curve: Path, **arguments) -> dict:
    """Run a stage's main without tracking and return its metrics."""
    given = argparse.Namespace(out=out, metrics=metrics, curve=curve, **arguments)
    stage = Stage(module.__name__.split(".")[-1], given, p)
    stage.tracker = mock.Mock()
    module.main(stage)
    return json.loads(metrics.read_text()) if metrics.is_file() else {}


def script(name: str, arguments: list[str], out: Path) -> None:
    """Run a stage, in a child, as `python -m stages.name` would, and write its output to a file."""
    with open(out, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = (
            io.TextIOWrapper(io.FileIO(number, "w", closefd=False), write_through=True) for number in (1, 2)
        )
        sys.argv = [f"stages/{name}.py", *map(str, arguments)]
        runpy.run_module(f"stages.{name}", run_name="__main__", alter_sys=True)
