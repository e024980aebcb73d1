"""The table of results that git keeps: which are in it, their changed settings, MILAN's score beside the best other one."""

import subprocess
from pathlib import Path

import pytest

from milan.core.errors import UserError
from milan.report import compare

TABLE = """kind,data,method,variant,linear,finetune,miou,dense
ours,world,MAE,mae,8.9,7.7,9.3,9.6
ours,world,Prompt,prompt_decoder,31.0,7.6,9.5,
ours,world,MILAN,milan,{linear},37.1,13.4,
published,ImageNet,MILAN,,78.9,85.2,52.7,
"""


def git(*words: str, **more) -> str:
    settings = ("-c", "user.name=a", "-c", "user.email=a@b")
    return subprocess.run(["git", *settings, *words], check=True, capture_output=True, text=True, **more).stdout.strip()


def result(linear: float, recipe: str) -> None:
    Path("params.yaml").write_text(recipe)
    Path("reports/table.csv").write_text(TABLE.format(linear=linear))


@pytest.fixture
def project(workplace) -> Path:
    """Two commits with results, one that changes none, and DVC's reference to an experiment; the folder has the first's."""
    for folder in ("conf/scale", "reports"):
        Path(folder).mkdir(parents=True)
    Path("conf/config.yaml").write_text("defaults: [_self_, {scale: mine}]")
    recipe = "scale: mine\npretrain: {mask_ratio: 0.75}\ndata: {imagenet: null, name: mine}\n"
    Path("conf/scale/mine.yaml").write_text(f"# @package _global_\n{recipe}")
    git("init", "-q")
    result(38.25, recipe)
    git("add", ".")
    git("commit", "-qm", "first")
    result(20.0, recipe.replace("null, name: mine", "/data/photos"))
    git("commit", "-qam", "photos")
    Path("other").touch()
    git("add", "other")
    git("commit", "-qm", "no result")
    result(30.0, recipe.replace("0.75", "0.5"))
    git("add", ".")
    made = git("commit-tree", "-p", "HEAD", "-m", "experiment", git("write-tree"))
    git("update-ref", f"refs/exps/01/{'2' * 38}/half", made)
    git("update-ref", "refs/exps/exec/EXEC_HEAD", made)
    git("checkout", "-q", "HEAD~2", "--", "params.yaml", "reports")
    return workplace


def test_results_of_folder_experiments_and_commits(project):
    """The folder's result is the first commit's and has its name; a cell without a number has a dash."""
    lines = compare.result_table().splitlines()
    first, photos = git("log", "--format=%h", "--reverse", "--", "params.yaml").splitlines()
    cells = [line.split("  ") for line in lines[:4]]
    rows = [[cell.strip() for cell in row if cell] for row in cells]
    assert rows[0] == ["result", "date", "data", "scale", "changed", "Linear eval", "Fine-tuning", "mIoU", "Dense probe mIoU"]
    assert [(row[0], *row[2:]) for row in rows[1:]] == [
        (first, "built-in world", "mine", "–", "38.3 / 31.0", "37.1 / 7.7", "13.4 / 9.5", "– / 9.6"),
        ("half", "built-in world", "mine", "mask_ratio=0.5", "30.0 / 31.0", "37.1 / 7.7", "13.4 / 9.5", "– / 9.6"),
        (photos, "photos", "mine", "–", "20.0 / 31.0", "37.1 / 7.7", "13.4 / 9.5", "– / 9.6"),
    ]
    assert lines[4:] == ["", compare.LEGEND]


def test_a_result_that_no_commit_has_is_this_folder_s(project):
    result(50.0, Path("params.yaml").read_text())
    assert compare.result_table().splitlines()[1].startswith("this folder  ")


def test_without_git_or_results_the_message_says_so(workplace):
    with pytest.raises(UserError, match="git knows no repository here"):
        compare.result_table()
    git("init", "-q")
    with pytest.raises(UserError, match="no result here yet"):
        compare.result_table()
