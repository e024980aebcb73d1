"""dvc.yaml: every stage depends on exactly the code that it runs, and on parameters that exist."""

import configparser
import hashlib
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from milan.core.code import closure, code_digest, imported
from milan.core.errors import UserError
from stages import code
from tests.conftest import ROOT

STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def entry(stage: str) -> dict:
    return {**STAGES[stage], **STAGES[stage].get("do", {})}


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def files_of(*files: str) -> set[str]:
    return {path.as_posix() for path in closure(*map(Path, files))}


def test_the_closure_sees_what_is_imported():
    near = {path.as_posix() for path in imported(Path("stages/pretrain.py"))}
    assert near >= {"milan/training/loop.py", "milan/training/optim.py", "milan/method/model.py"} and "milan/method/decoder.py" not in near
    assert "milan/teacher/frozen.py" in near  # inside a function
    assert "milan/method/decoder.py" in files_of("stages/pretrain.py") and "milan/ingest/world/drawing.py" not in files_of("stages/pretrain.py")
    assert "milan/report/figures.py" in files_of("notebooks/2_masking.ipynb")


@pytest.mark.parametrize("stage", sorted({*STAGES} - {"code"}))
def test_a_stage_depends_on_its_own_code_and_no_other(stage):
    deps = entry(stage)["deps"]
    assert [dep for dep in deps if dep.startswith("outs/code") or dep.endswith(".py")] == [f"outs/code/{stage}.txt"]


def test_lists_by_hand_and_what_an_edit_changes(workplace):
    texts = {
        "milan/a.py": "import os\nfrom milan import b\n", "milan/b.py": "", "milan/c.py": "import milan.b\n", "stages/__init__.py": "",
        "stages/one.py": "from milan.a import x\n", "stages/two.py": "def f():\n    from milan import c\n", "stages/figures.py": "",
        "notebooks/1.ipynb": json.dumps({"cells": [
            {"cell_type": "code", "source": ["import numpy\n", "from milan.c import y"]},
            {"cell_type": "markdown", "source": ["from milan import a"]},
        ]}),
    }  # fmt: skip
    for name, text in texts.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)

    def listed() -> dict[str, str]:
        code.main(SimpleNamespace(name="code", args=SimpleNamespace(out=Path("outs/code"))))
        return {path.stem: path.read_text() for path in Path("outs/code").iterdir()}

    before = listed()
    files = {name: [line.split("  ")[1] for line in text.splitlines()] for name, text in before.items()}
    assert files == {
        "one": ["milan/a.py", "milan/b.py", "stages/one.py"],
        "two": ["milan/b.py", "milan/c.py", "stages/two.py"],
        "figures": ["milan/b.py", "milan/c.py", "stages/figures.py"],
    }
    assert before["one"].startswith(f"{hashlib.sha256(texts['milan/a.py'].encode()).hexdigest()}  milan/a.py\n")
    Path("milan/a.py").write_text("from milan import b  # touched\n")
    assert {name for name, text in listed().items() if text != before[name]} == {"one"}
    Path("milan/b.py").write_text("# touched\n")
    assert {name for name, text in listed().items() if text != before[name]} == {"one", "two", "figures"}


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("m.py", "x = 1\nfrom .b import c\n", "m.py, line 2: write the import out in full"),
        ("m.py", "x = 1\ndef f(:\n", "m.py, line 2: invalid syntax"),
        ("m.ipynb", "{}", "m.ipynb is damaged"),
        ("m.ipynb", "{", "m.ipynb is damaged"),
    ],
)
def test_what_cannot_be_followed_is_named(workplace, name, text, said):
    Path(name).write_text(text)
    with pytest.raises(UserError, match=said):
        closure(Path(name))


def test_a_saved_state_is_of_all_code_that_may_still_be_imported(workplace, monkeypatch):
    """Also of what a module in use imports inside a function, as pretraining does its teacher; and of nothing else."""
    Path("milan/core").mkdir(parents=True)
    for name, text in {"a": "def f():\n    from milan import b\n", "b": "", "c": "", "core/code": ""}.items():
        Path(f"milan/{name}.py").write_text(text)
    monkeypatch.setattr("milan.core.code.__file__", str(workplace / "milan/core/code.py"))
    monkeypatch.setitem(sys.modules, "a of this test", SimpleNamespace(__file__=str(workplace / "milan/a.py")))
    digests = [code_digest()]
    for name in ("c", "b", "a"):
        Path(f"milan/{name}.py").write_text(Path(f"milan/{name}.py").read_text() + "# touched\n")
        digests.append(code_digest())
    assert [new != old for old, new in zip(digests, digests[1:])] == [False, True, True]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_runs_the_script_of_its_name_and_no_other_stage_s_code(stage):
    assert re.findall(r"-m stages\.(\w+)", entry(stage)["cmd"]) == [stage]
    assert {name for name in files_of(f"stages/{stage}.py") if name.startswith("stages/")} == {f"stages/{stage}.py"}


def keys_of(stage: str) -> list[tuple[str, str]]:
    """(file, dotted key) of a stage's params."""
    found = []
    for item in entry(stage).get("params", []):
        for file, keys in item.items() if isinstance(item, dict) else [("params.yaml", [item])]:
            found += [(file, key) for key in keys or []]
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_every_params_key_exists(stage):
    for file, key in keys_of(stage):
        tree = yaml.safe_load((ROOT / file).read_text())
        for name in key.split("."):
            assert isinstance(tree, dict) and name in tree, f"{stage}: {key} is not in {file}"
            tree = tree[name]


@pytest.mark.parametrize("stage", STAGES)
def test_what_may_not_change_a_result_reruns_nothing(stage):
    written = {"report", "figures"}  # which name the scale on the page
    assert not {key.split(".")[0] for _, key in keys_of(stage)} & {"runtime", *([] if stage in written else ["scale"])}


@pytest.mark.parametrize("stage", ["teacher", "extract_targets", "pretrain", "linear_eval", "finetune", "segment"])
def test_what_changes_the_last_bits_reruns_what_computes(stage):
    assert ("params.yaml", "compute") in keys_of(stage)


def test_the_figures_depend_on_every_notebook():
    assert {path.relative_to(ROOT).as_posix() for path in ROOT.glob("notebooks/*.ipynb")} <= set(entry("figures")["deps"])


def test_what_changes_from_run_to_run_is_no_out():
    """So that a forced rerun leaves dvc.lock as it was."""
    assert "--out reports/index.html" in entry("page")["cmd"] and not {"outs", "metrics", "plots"} & set(entry("page"))


def test_no_telemetry():
    config = configparser.ConfigParser()
    config.read(ROOT / ".dvc" / "config")
    assert config["core"].getboolean("analytics") is False
