"""Studies: what is asked of DVC, in which clone, and that the repository stays as it was."""

import fcntl
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from milan.core.errors import UserError
from milan.params import read_params
from milan.report import studies, sweep
from milan.report.results import MEASURES
from tests.conftest import ROOT, change, forked


@pytest.fixture
def repository(workplace, monkeypatch) -> Path:
    """A committed repository, empty but for a file in milan/, as the place to be."""
    Path("milan").mkdir(exist_ok=True)
    Path("milan/a.py").write_text("1\n")
    Path(".gitignore").write_text("/.scratch/\n")
    for who in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{who}_NAME", "t")
        monkeypatch.setenv(f"GIT_{who}_EMAIL", "t@example.org")
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "one"]):
        subprocess.run(["git", *command], check=True)
    return Path.cwd()


@pytest.fixture
def asked(monkeypatch) -> list[tuple[str, ...]]:
    """The words given to DVC, which is not run."""
    words = []

    def dvc(*given: str, **options) -> subprocess.CompletedProcess:
        words.append(given)
        return subprocess.CompletedProcess(given, 0, stdout="/the/cache\n")

    monkeypatch.setattr(studies, "dvc", dvc)
    return words


def test_every_study_varies_a_key_of_the_recipe(tree):
    for study in studies.STUDIES.values():
        assert study.key in sweep.flattened(tree)


def test_which_studies():
    assert list(studies.chosen([], None)) == ["seeds", "views", "mask_ratio", "decoder_depth"]
    (name, study), *more = studies.chosen(["mask_ratio"], "0.6,0.8").items()
    assert (name, study.key, study.values, more) == ("mask_ratio", "pretrain.mask_ratio", ("0.6", "0.8"), [])
    for names, values, words in (
        (["mask"], None, "mask: there is no such"),
        ([], "1,2", "one study"),
        (["seeds"], "1", "one study"),
    ):
        with pytest.raises(UserError, match=words):
            studies.chosen(names, values)


def test_the_command_is_the_one_that_was_given():
    plain, other = studies.STUDIES["views"], studies.chosen(["views"], "1,3")["views"]
    assert studies.command("views", plain, []) == "python -m milan.report.studies views"
    assert studies.command("views", other, ["scale=smoke"]) == "python -m milan.report.studies views --values 1,3 -S 'scale=smoke'"
    other_place = studies.command("views", plain, ["scale=smoke"], Path("reports/elsewhere"))
    assert other_place == "python -m milan.report.studies views -S 'scale=smoke' --out reports/elsewhere"


def test_the_clone_follows_the_commit_and_shares_the_cache(repository, asked):
    studies.make_clone()
    assert (studies.CLONE / "milan/a.py").read_text() == "1\n" and ("config", "--local", "cache.dir", "/the/cache") in asked
    (studies.CLONE / ".scratch").mkdir()
    (studies.CLONE / ".scratch/half-done").touch()
    Path("milan/a.py").write_text("2\n")
    with pytest.raises(UserError, match=r"run what is committed, and this is not: M milan/a\.py"):
        studies.make_clone()
    subprocess.run(["git", "commit", "-qam", "two"], check=True)
    studies.make_clone()
    assert (studies.CLONE / "milan/a.py").read_text() == "2\n" and (studies.CLONE / ".scratch/half-done").exists()


def test_a_point_starts_from_the_commit_and_settings_come_last(repository, asked):
    Path("milan/a.py").write_text("of the point before\n")
    studies.experiment("mask_ratio-0.5", studies.STUDIES["mask_ratio"], 0.5, ["scale=smoke"], lock=0)
    assert Path("milan/a.py").read_text() == "1\n"
    given = ["-S", "variants=[milan]", "-S", "pretrain.mask_ratio=0.5", "-S", "scale=smoke"]
    assert list(asked[-1]) == ["exp", "run", "--name", "mask_ratio-0.5", *given, "linear_eval", "finetune", "segment"]


def test_a_point_that_fails_is_named(monkeypatch):
    monkeypatch.setattr(studies.sys, "executable", "/bin/false")
    with pytest.raises(UserError, match="dvc exp run ended with status 1.*same command again"):
        studies.dvc("exp", "run")


def test_the_next_driver_waits_for_what_a_killed_one_started(workplace):
    """The lock is held by the process that got its number, after the driver is gone."""
    end, start = os.pipe()

    def driver() -> None:
        with studies.alone("studies") as lock:
            subprocess.Popen(["cat"], stdin=end, pass_fds=[lock])
            os._exit(9)

    os.set_inheritable(start, False)
    assert forked(driver) == 9
    with open(".scratch/studies.lock") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(start)  # cat ends
    with studies.alone("studies"):
        pass


def test_the_seeds_page_has_table_claims_numbers_and_lock(tree, workplace):
    change(tree, "variants", ["mae", "milan"])
    change(tree, "seeds", [0, 1, 2])
    Path("params.yaml").write_text(yaml.safe_dump(tree))
    Path("dvc.lock").write_text("schema: '2.0'\nstages: {teacher: {cmd: t}, report: {cmd: r}}")
    folder = Path("reports/metrics/demo")
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "reports/published.csv", "reports")
    for (stage, name), variant, seed in [(m, v, s) for m in MEASURES.values() for v in ("mae", "milan") for s in range(3)]:
        path = folder / stage / f"{variant}-{seed}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**before, name: 12.0 + seed if variant == "milan" else 10.0}))
    for name, value in {"teacher": "{}", "extract_targets": "{}", "prepare_ade20k": '{"prepare_ade20k/val": 400}'}.items():
        (folder / f"{name}.json").write_text(value)
    (folder / "prepare_imagenet.json").write_text('{"prepare_imagenet/classes": 20, "prepare_imagenet/val": 2000}')
    out = Path("evidence")
    studies.write_seeds(read_params(Path("params.yaml")), [], out, "Do they hold?")
    text = (out / "table.md").read_text()
    assert text.startswith("# Variants over seeds at scale demo\n\nDo they hold?\n\n")
    assert "| MILAN is above MAE | MILAN – MAE | Linear eval | +3.00 | +0.52 to +5.48 | 3 | supported |" in text
    epochs = tree["pretrain"]["epochs"]
    assert "../outs" not in text and f"| MILAN | ViT-tiny/8 | {epochs} | 128 | 13.0 (12.0–14.0) |" in text
    assert (out / "table.csv").read_text().splitlines()[:2] == [
        "variant,seed,linear,knn,zero_shot,zero_shot_masked,finetune,miou",
        "mae,0,10.0,10.0,,,10.0,10.0",
    ]
    assert (out / "claims.csv").read_text().splitlines()[1].endswith(",3.0,0.5159,5.4841,3,supported")
    assert yaml.safe_load((out / "dvc.lock").read_text())["stages"] == {"teacher": {"cmd": "t"}}
    assert (out / "figure.png").stat().st_size > 10_000
