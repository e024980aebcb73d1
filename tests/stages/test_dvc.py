"""dvc.yaml: every stage depends on the code that can change its numbers, and on parameters that exist."""

import configparser
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from milan.core.code import NOT_DEPENDENCIES, changed_files, closure, imported, stage_code
from milan.core.errors import UserError
from milan.params import SceneTraining, stages_of
from tests.conftest import ROOT

STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def entry(stage: str) -> dict:
    return {**STAGES[stage], **STAGES[stage].get("do", {})}


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def files_of(*files: str) -> set[str]:
    return {path.as_posix() for path in closure(*map(Path, files))}


def covers(dependency: str, file: str) -> bool:
    """Return whether an edit of the file changes this dependency: the file itself, or a folder above it."""
    return file == dependency or file.startswith(f"{dependency}/")


def code_of(stage: str) -> list[str]:
    """Return the dependencies of a stage that are code."""
    return [dep for dep in entry(stage)["deps"] if dep.startswith(("milan/", "stages/"))]


def test_the_closure_sees_what_is_imported():
    near = {path.as_posix() for path in imported(Path("stages/pretrain.py"))}
    assert near >= {"milan/training/loop.py", "milan/method/model.py"} and "milan/method/decoder.py" not in near
    assert "milan/teacher/frozen.py" in near  # inside a function
    assert "milan/method/decoder.py" in files_of("stages/pretrain.py")
    assert not any(file.startswith("milan/ingest") for file in files_of("stages/pretrain.py"))
    assert "milan/report/project.py" in files_of("notebooks/2_masking.ipynb")


@pytest.mark.parametrize("stage", STAGES)
def test_the_dependencies_cover_all_code_that_can_change_the_result(stage):
    files = stage_code(stage)
    assert f"stages/{stage}.py" in files and f"stages/{stage}.py" in entry(stage)["deps"]
    assert [file for file in files if not any(covers(dep, file) for dep in entry(stage)["deps"])] == []


@pytest.mark.parametrize("stage", STAGES)
def test_every_dependency_is_used(stage):
    assert [dep for dep in code_of(stage) if not any(covers(dep, file) for file in stage_code(stage))] == []


def test_code_that_is_no_dependency_is_a_short_list():
    """These hold errors, files and progress; the recipe, whose values are DVC params; the frame of a stage; tracking."""
    assert NOT_DEPENDENCIES == ("milan/core", "milan/params.py", "milan/stage.py", "milan/tracking")
    assert all(Path(entry).exists() for entry in NOT_DEPENDENCIES)


EDITS = {  # file that is edited: stages that DVC then runs again
    "milan/segmentation/miou.py": "prepare_ade20k segment dense_probe figures",
    "milan/evaluation/augmentation.py": "linear_eval attentive_probe finetune",
    "milan/evaluation/linear.py": "teacher linear_eval attentive_probe finetune dense_probe robustness",
    "milan/evaluation/monitor.py": "pretrain linear_eval attentive_probe finetune",
    "milan/report/table.py": "report figures page",
    "milan/tracking/tracker.py": "",
    "milan/serve/serving.py": "",
    "milan/plan.py": "",
    "milan/ingest/packing.py": "prepare_imagenet prepare_ade20k prepare_robustness",
    "milan/method/masking.py": "extract_targets pretrain linear_eval attentive_probe finetune segment dense_probe robustness figures",
    "milan/training/loop.py": (
        "teacher extract_targets pretrain linear_eval attentive_probe finetune segment dense_probe robustness figures"
    ),
    "stages/pretrain.py": "pretrain",
}


@pytest.mark.parametrize("file", EDITS)
def test_an_edit_reruns_exactly_these_stages(file):
    assert Path(file).exists()
    assert {stage for stage in STAGES if any(covers(dep, file) for dep in entry(stage)["deps"])} == set(EDITS[file].split())


def test_missing_scenes_are_told_before_the_images_are_packed():
    """`dvc repro` takes the stages in the order of dvc.yaml, and what each needs before it."""
    assert list(STAGES)[:2] == ["prepare_ade20k", "prepare_imagenet"]


def test_the_code_of_a_stage_by_hand(workplace):
    texts = {
        "milan/a/one.py": "import os\nfrom milan.b import two\n", "milan/b/two.py": "", "milan/b/three.py": "import milan.b.two\n",
        "milan/core/files.py": "from milan.b import three\n", "stages/first.py": "from milan.a.one import x\nfrom milan.core import files\n",
        "stages/figures.py": "", "notebooks/1.ipynb": json.dumps({"cells": [
            {"cell_type": "code", "source": ["import numpy\n", "def f():\n", "    from milan.b.three import y"]},
            {"cell_type": "markdown", "source": ["from milan.a import one"]},
        ]}),
    }  # fmt: skip
    for name, text in texts.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)
    first = stage_code("first", workplace)
    # Imports are followed through milan/core too, whose own files are not listed.
    assert list(first) == ["milan/a/one.py", "milan/b/three.py", "milan/b/two.py", "stages/first.py"]
    assert first["milan/a/one.py"] == hashlib.sha256(texts["milan/a/one.py"].encode()).hexdigest()
    assert list(stage_code("figures", workplace)) == ["milan/b/three.py", "milan/b/two.py", "notebooks/1.ipynb", "stages/figures.py"]
    Path("milan/core/files.py").write_text("from milan.b import three  # touched\n")
    assert stage_code("first", workplace) == first
    Path("milan/b/two.py").write_text("# touched\n")
    assert changed_files(first, stage_code("first", workplace)) == ["milan/b/two.py"]
    Path("stages/first.py").write_text("from milan.a.one import x\n")
    assert changed_files(first, stage_code("first", workplace)) == ["milan/b/three.py", "milan/b/two.py", "stages/first.py"]


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("m.py", "x = 1\nfrom .b import c\n", "m.py, line 2: write the import out in full"),
        ("m.py", "x = 1\ndef f(:\n", "m.py, line 2: invalid syntax"),
        ("m.ipynb", "{}", "m.ipynb is damaged"),
        ("m.ipynb", "{", "m.ipynb is damaged"),
    ],
)
def test_an_import_that_cannot_be_followed_is_named(workplace, name, text, said):
    Path(name).write_text(text)
    with pytest.raises(UserError, match=said):
        closure(Path(name))


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_runs_the_script_of_its_name_and_no_other_stage_s_code(stage):
    assert re.findall(r"-m stages\.(\w+)", entry(stage)["cmd"]) == [stage]
    assert {name for name in files_of(f"stages/{stage}.py") if name.startswith("stages/")} == {f"stages/{stage}.py"}


def test_the_stages_that_need_no_labels_are_those_on_scenes():
    """What a message says of images without labels (milan/data/records.py)."""
    assert stages_of(SceneTraining) == [stage for stage in STAGES if "--scenes" in entry(stage)["cmd"]]


@pytest.mark.parametrize("stage", STAGES)
def test_no_value_of_the_recipe_reaches_a_shell(stage):
    """DVC gives cmd to a shell; what DVC puts in place of ${...} would be run."""
    assert "${" not in entry(stage)["cmd"]


def test_a_recipe_that_is_a_program_does_not_run(tmp_path, monkeypatch):
    """By DVC itself, with the project's own commands and a stand-in for Python that prints its arguments."""
    marker, bad = tmp_path / "ran", f"a; touch {tmp_path / 'ran'}; echo $(touch {tmp_path / 'ran'})"
    stages = {}
    for name, given in {name: STAGES[name] for name in ("prepare_ade20k", "pretrain", "report")}.items():
        stage = {**given, "cmd": given["cmd"].replace("$MILAN_LAUNCHER ", "").replace("python -m", "./python -m")}
        stages[name] = {key: stage[key] for key in ("matrix", "cmd") if key in stage}
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    recipe = {"data": {"name": bad}, "report": {"published": bad}, "variants": [bad], "seeds": [bad]}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@" >> said\n')
    (tmp_path / "python").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    for words in (["init", "--no-scm", "-q"], ["repro", "-q"]):
        subprocess.run([sys.executable, "-m", "dvc", *words], cwd=tmp_path, check=True, capture_output=True)
    assert not marker.exists()
    said = (tmp_path / "said").read_text()
    assert all(word in said for word in ("outs/{name}/ade20k", "--variant {variant} --seed {seed}", "--published {published}"))


def keys_of(stage: str) -> list[tuple[str, str]]:
    """Return the (file, dotted key) pairs of a stage's params."""
    pairs = []
    for item in entry(stage).get("params", []):
        for file, keys in item.items() if isinstance(item, dict) else [("params.yaml", [item])]:
            pairs += [(file, key) for key in keys or []]
    return pairs


@pytest.mark.parametrize("stage", STAGES)
def test_every_params_key_exists(stage):
    for file, key in keys_of(stage):
        tree = yaml.safe_load((ROOT / file).read_text())
        for name in key.split("."):
            assert isinstance(tree, dict) and name in tree, f"{stage}: {key} is not in {file}"
            tree = tree[name]


@pytest.mark.parametrize("stage", STAGES)
def test_execution_settings_rerun_nothing(stage):
    written = {"report", "figures"}  # they print the scale
    assert not {key.split(".")[0] for _, key in keys_of(stage)} & {"runtime", *([] if stage in written else ["scale"])}


@pytest.mark.parametrize("stage", EDITS["milan/training/loop.py"].split())
def test_numerical_settings_rerun_every_stage_that_computes(stage):
    assert ("params.yaml", "compute") in keys_of(stage)


def test_the_figures_depend_on_every_notebook():
    assert {path.relative_to(ROOT).as_posix() for path in ROOT.glob("notebooks/*.ipynb")} <= set(entry("figures")["deps"])


def test_the_page_is_no_out():
    """It states times and hardware: as an out it would change dvc.lock at every forced rerun."""
    assert "--out reports/index.html" in entry("page")["cmd"] and not {"metrics", "plots"} & set(entry("page"))
    assert entry("page")["outs"] == [{"outs/${data.name}/page.json": {"persist": True}}]  # DVC keeps no run of it


def test_no_telemetry():
    config = configparser.ConfigParser()
    config.read(ROOT / ".dvc" / "config")
    assert config["core"].getboolean("analytics") is False
