"""What every program does alike: errors as a paragraph, whose commands can be copied, UTF-8 in every locale, a quick start and end."""

import atexit
import gc
import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml
from PIL import Image

import stages
from milan.core.parallel import end_with
from milan.core.program import end_at_once, end_with_workers, fail, loaded
from milan.training import distributed
from milan.training.failures import FAILURE
from tests.conftest import ROOT, forked


def test_no_line_breaks_a_command(capsys):
    command = "`find . -name " + "word " * 30 + "-delete`"
    with pytest.raises(SystemExit) as end:
        fail(f"{'Something is wrong here. ' * 6}Run {command} and then run it again.", 3)
    said = capsys.readouterr().err
    lines = said.strip().splitlines()
    assert end.value.code == 3 and lines[0].startswith("error: Something is wrong")
    assert [line for line in lines if command in line] and all(len(line) <= 100 for line in lines if command not in line)


# Python's UTF-8 mode is off, and the locale is not UTF-8, as en_US.ISO-8859-1 is not.
OTHER_LOCALE = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


def test_a_locale_that_is_not_utf_8_changes_no_name(workplace, tree):
    names = ["cafe\u0301", "\u9e64 crane"]
    for split in ("train", "val"):
        for name in names:
            Path("images", split, name).mkdir(parents=True)
            for number in range(2):
                Image.effect_noise((64, 64), 60).convert("RGB").save(Path("images", split, name, f"\u00fc{number}.JPEG"))
    tree["data"]["imagenet"] = "images"
    tree["scale"] = "gr\u00f6\u00dfer"
    tree["runtime"]["processes"] = 1
    for name in ("teacher", "pretrain", "linear_eval", "attentive_probe", "finetune"):
        tree[name] |= {"batch_size": 2, "micro_batch": 2}
    tree["finetune"]["labels"] = 1.0
    Path("reports").mkdir()
    Path("reports/published.csv").touch()
    Path("params.yaml").write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    environment = {**os.environ, **OTHER_LOCALE, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "stages.prepare_imagenet", "--out", "records", "--metrics", "m.json"]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert json.loads(Path("records/manifest.json").read_text(encoding="utf-8"))["classes"] == sorted(names)


@pytest.mark.parametrize("argument, collects", [("-m", False), ("stages/pretrain.py", True), ("pytest", True)])
def test_no_collection_while_the_libraries_of_a_stage_load(argument, collects, monkeypatch):
    monkeypatch.setattr(sys, "argv", [argument])
    try:
        importlib.reload(stages)
        assert gc.isenabled() == collects
        loaded()
        assert gc.isenabled() and gc.get_freeze_count() > 10_000
    finally:
        atexit.unregister(gc.unfreeze)
        gc.unfreeze()
        gc.enable()


def say_and_end(out: Path) -> None:
    os.dup2(os.open(out, os.O_CREAT | os.O_WRONLY), 1)
    sys.stdout = os.fdopen(1, "w")
    atexit.register(print, "from the handler")
    print("said, ", end="")
    try:
        end_at_once()
    finally:
        print("torn down")


def test_a_quick_end_runs_the_exit_handlers_and_writes_what_was_said(tmp_path):
    assert forked(say_and_end, tmp_path / "out") == 0
    assert (tmp_path / "out").read_text() == "said, from the handler\n"


def hold_a_worker(note: Path, end: Callable) -> None:
    """Start a worker that ignores SIGTERM, as those of loaders do, and let another thread or itself end this process."""
    worker = multiprocessing.get_context("fork").Process(target=outlive_sigterm, daemon=True)
    worker.start()
    note.write_text(str(worker.pid))
    end()
    time.sleep(60)


def outlive_sigterm() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)


def in_a_thread(function: Callable, *arguments) -> None:
    threading.Thread(target=function, args=arguments, daemon=True).start()


@pytest.mark.parametrize("end", [
    lambda: end_with_workers(1),
    lambda: in_a_thread(distributed.end_after_failure, Namespace(check=lambda keys: keys == [FAILURE])),
    lambda: end_with(parent=-1),
], ids=["at once", "after another's failure", "with its parent"])  # fmt: skip
def test_a_process_that_ends_at_once_leaves_no_worker(end, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "FAIL_SECONDS", 0)
    assert forked(hold_a_worker, tmp_path / "note", end) == 1
    worker = int((tmp_path / "note").read_text())
    deadline = time.monotonic() + 20
    while psutil.pid_exists(worker) and psutil.Process(worker).status() != psutil.STATUS_ZOMBIE:  # what nobody here reaps
        assert time.monotonic() < deadline
        time.sleep(0.02)
