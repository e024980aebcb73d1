"""dvc.yaml: every stage depends on exactly the code that it runs, and on parameters that exist."""

import ast
import configparser
import json
import re

import pytest
import yaml

from tests.conftest import ROOT

STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def imported(file: str) -> set[str]:
    """Files of milan/ and stages/ that a file names in its imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(source(file))):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            raise AssertionError(f"{file}: write the import out in full, a relative one is not followed here")
    files = {name.replace(".", "/") + ".py" for name in found if name.split(".")[0] in ("milan", "stages")}
    return {name for name in files if (ROOT / name).exists()}


def source(file: str) -> str:
    """Python text of a script, or of a notebook's code cells."""
    text = (ROOT / file).read_text()
    if not file.endswith(".ipynb"):
        return text
    return "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code")


def closure(*files: str) -> set[str]:
    """The files and all that they import, directly or through others."""
    found, left = set(), set(files)
    while left:
        found.add(name := left.pop())
        left |= imported(name) - found
    return found


def entry(stage: str) -> dict:
    return {**STAGES[stage], **STAGES[stage].get("do", {})}


def test_the_closure_sees_what_is_imported():
    assert imported("stages/pretrain.py") >= {"milan/fit.py", "milan/optim.py", "milan/model.py"}
    assert "milan/decoder.py" not in imported("stages/pretrain.py")
    assert "milan/decoder.py" in closure("stages/pretrain.py")
    assert "milan/world.py" not in closure("stages/pretrain.py")


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_its_code_and_no_other(stage):
    listed = {dep for dep in entry(stage)["deps"] if re.fullmatch(r"(milan|stages)/\w+\.py", dep)}
    notebooks = {dep for dep in entry(stage)["deps"] if dep.endswith(".ipynb")}
    needed = closure(f"stages/{stage}.py", *notebooks) - notebooks
    assert listed == needed, f"missing {sorted(needed - listed)}, unneeded {sorted(listed - needed)}"


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_runs_the_script_of_its_name_and_no_other_stage_s_code(stage):
    assert re.findall(r"-m stages\.(\w+)", entry(stage)["cmd"]) == [stage]
    assert {name for name in closure(f"stages/{stage}.py") if name.startswith("stages/")} == {f"stages/{stage}.py"}


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
