"""Studies: the experiments that DVC is asked for, and the page over seeds."""

import fcntl
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from milan.core.errors import UserError
from milan.core.identity import flatten
from milan.report import studies, sweep
from milan.report.results import MEASURES
from tests.conftest import ROOT, change, forked


@pytest.fixture
def repository(workplace, monkeypatch) -> Path:
    """A committed repository with one file, milan/a.py, as the current folder."""
    Path("milan").mkdir()
    Path("milan/a.py").write_text("1\n")
    Path(".gitignore").write_text("/.scratch/\n")
    for who in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{who}_NAME", "t")
        monkeypatch.setenv(f"GIT_{who}_EMAIL", "t@example.org")
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "one"]):
        subprocess.run(["git", *command], check=True)
    return Path.cwd()


@pytest.fixture
def asked(monkeypatch, tree, workplace) -> list[tuple[str, ...]]:
    """The words of `dvc exp run`, each of which makes an experiment; DVC is not run. The table has their names."""
    words, made = [], [sweep.Experiment(sweep.HERE, tree, {}, {}), sweep.Experiment("mask_ratio-0.5", tree, {}, {})]

    def dvc(*given: str, **options) -> None:
        words.append(given)
        made.append(sweep.Experiment(given[4], tree, {}, {}))

    def write(key: str, experiments: list[sweep.Experiment], known: list, out: Path, about: str) -> None:
        words.append((key, *[experiment.name for experiment in experiments], str(out)))

    monkeypatch.setattr(sweep, "dvc", dvc)
    monkeypatch.setattr(sweep, "read_experiments", lambda: list(made))
    monkeypatch.setattr(sweep, "write", write)
    monkeypatch.setattr(studies.costs, "known_runs", lambda names: [])
    monkeypatch.setattr(studies.subprocess, "run", lambda command, check: None)  # the logger
    return words


def test_every_study_varies_a_key_of_the_recipe(tree):
    for study in studies.STUDIES.values():
        assert study.key in flatten(tree)


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


def test_changes_that_an_experiment_would_take_along_are_refused(repository):
    studies.refuse_changes()
    Path("params.yaml").write_text("no committed file")
    studies.refuse_changes()
    Path("milan/a.py").write_text("2\n")
    with pytest.raises(UserError, match=r"run what is committed, and this is not: M milan/a\.py"):
        studies.refuse_changes()


def test_points_without_a_result_are_run_and_settings_come_last(asked):
    study = studies.chosen(["mask_ratio"], "0.5,0.9")["mask_ratio"]
    studies.run("mask_ratio", study, [], Path("out"), lock=0)
    start = ("exp", "run", "--temp", "--name")
    fixed = ("-S", "variants=[milan]", "-S", "pretrain.mask_ratio=0.9")
    assert asked[0] == (*start, "mask_ratio-0.9", *fixed, *studies.EVALUATIONS)
    assert asked[1:] == [("pretrain.mask_ratio", "mask_ratio-0.5", "mask_ratio-0.9", "out/mask_ratio")]
    studies.run("mask_ratio", study, ["scale=smoke"], Path("out"), lock=0)
    names = [studies.point_name("mask_ratio", value, ["scale=smoke"]) for value in study.values]
    assert [words[4] for words in asked[2:4]] == names, "other settings are other experiments"
    assert asked[3][5:] == (*fixed, "-S", "scale=smoke", *studies.EVALUATIONS)
    assert asked[4] == ("pretrain.mask_ratio", *names, "out/mask_ratio")


def test_the_names_of_points():
    assert studies.point_name("mask_ratio", 0.5, []) == "mask_ratio-0.5"
    assert studies.point_name("seeds", "[0,1,2]", []) == "seeds-0-1-2"
    assert re.fullmatch(r"views-0-[0-9a-f]{8}", studies.point_name("views", 0, ["data.imagenet=/home/me/imagenet"]))


def test_only_workspaces_of_killed_runs_of_the_study_are_removed(workplace):
    for name in ("mask_ratio-0.5", "mine"):
        (workplace / f"tmp-{name}/outs").mkdir(parents=True)
        record = workplace / studies.EXECUTIONS / name / f"{name}.run"
        record.parent.mkdir(parents=True)
        record.write_text(json.dumps({"name": name, "root_dir": str(workplace / f"tmp-{name}")}))
    studies.remove_killed(["mask_ratio-0.5", "mask_ratio-0.9"])
    assert [path.name for path in workplace.glob("tmp-*")] == ["tmp-mine"]


EVALUATE = """
import json, os, signal, sys
from pathlib import Path
import psutil, yaml
recipe = yaml.safe_load(open("params.yaml"))
project = Path.cwd().parents[4]
with open(project / "ran", "a") as file:
    print(recipe["pretrain"]["mask_ratio"], file=file)
if recipe["pretrain"]["mask_ratio"] == 0.9 and not (project / "killed").exists():
    (project / "killed").touch()
    for process in psutil.Process().parents():
        if "dvc" in process.cmdline()[:3]:
            process.kill()
    sys.exit(1)
for path, name in [word.split(":") for word in sys.argv[1:]]:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(Path(path).read_text()) if Path(path).exists() else {}
    Path(path).write_text(json.dumps({**known, name: 100 * recipe["pretrain"]["mask_ratio"]}))
"""


@pytest.fixture
def tiny(repository, monkeypatch) -> Path:
    """A pipeline of one stage under DVC and Hydra; the first run at 0.9 kills DVC."""
    files = [(f"reports/metrics/tiny/{stage}/milan-0.json", name) for stage, name in MEASURES.values()]
    words, paths = [f"{path}:{name}" for path, name in files], sorted({path for path, _ in files})
    stage = {"cmd": f"python evaluate.py {' '.join(words)}", "deps": ["evaluate.py"], "params": ["pretrain", "scale"]}
    pipeline = {"stages": {"evaluate": {**stage, "metrics": [{path: {"cache": False}} for path in paths]}}}
    recipe = {"scale": "tiny", "data": {"name": "tiny"}, "variants": ["milan"], "seeds": [0], "pretrain": {"mask_ratio": 0.75}}
    Path("conf").mkdir()
    for path, content in {"dvc.yaml": pipeline, "conf/config.yaml": recipe, "params.yaml": recipe}.items():
        Path(path).write_text(yaml.safe_dump(content))
    Path("evaluate.py").write_text(EVALUATE)
    sweep.dvc("init", "--quiet")
    sweep.dvc("config", "hydra.enabled", "true")
    for command in (["add", "-A"], ["commit", "-qm", "tiny"]):
        subprocess.run(["git", *command], check=True)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(studies, "EVALUATIONS", ("evaluate",))
    return repository


def test_a_killed_study_continues_and_leaves_the_workspace_alone(tiny):
    study = studies.chosen(["mask_ratio"], "0.5,0.9")["mask_ratio"]
    Path("params.yaml").write_text("mine: 1\n")
    with pytest.raises(UserError, match=r"mask_ratio-0\.9 .* ended with status -9"):
        studies.run("mask_ratio", study, [], Path("out"), lock=0)
    assert len(list(Path(".dvc/tmp/exps/standalone").glob("tmp*"))) == 1
    for _ in range(2):
        studies.run("mask_ratio", study, [], Path("out"), lock=0)
    assert Path("ran").read_text().split() == ["0.5", "0.9", "0.9"], "each finished point ran once"
    assert not list(Path(".dvc/tmp/exps/standalone").glob("tmp*"))
    assert sweep.git("status", "--porcelain", "-uno") == " M params.yaml\n" and Path("params.yaml").read_text() == "mine: 1\n"
    text = Path("out/mask_ratio/table.md").read_text()
    assert "| 0.5 | 50.0 |" in text and "| 0.9 | 90.0 |" in text
    assert yaml.safe_load(Path("out/mask_ratio/mask_ratio-0.9/params.yaml").read_text())["pretrain"] == {"mask_ratio": 0.9}
    assert "evaluate" in yaml.safe_load(Path("out/mask_ratio/mask_ratio-0.9/dvc.lock").read_text())["stages"]


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
    Path("reports").mkdir()
    shutil.copy(ROOT / "reports/published.csv", "reports")
    constant = {"prepare_ade20k/constant_miou": 1.5, "prepare_ade20k/constant_pixel_accuracy": 16.0}
    metrics = {"teacher.json": {}, "extract_targets.json": {}, "prepare_ade20k.json": {"prepare_ade20k/val": 400, **constant}}
    metrics["prepare_imagenet.json"] = {"prepare_imagenet/classes": 20, "prepare_imagenet/val": 2000, "prepare_imagenet/train": 8000}
    for (stage, name), variant, seed in [(m, v, s) for m in MEASURES.values() for v in ("mae", "milan") for s in range(3)]:
        metrics.setdefault(f"{stage}/{variant}-{seed}.json", {})[name] = 12.0 + seed if variant == "milan" else 10.0
    out = Path("evidence")
    studies.write_seeds(sweep.Experiment("seeds-0-1-2", tree, metrics, {"teacher": {"cmd": "t"}}), [], out, "Do they hold?")
    text = (out / "table.md").read_text()
    assert text.startswith("# Variants over seeds at scale demo\n\nDo they hold?\n\n")
    assert "| MILAN is above MAE | MILAN – MAE | Linear eval | +3.00 | +0.52 to +5.48 | 3 | supported |" in text
    epochs, batch = tree["pretrain"]["epochs"], tree["pretrain"]["batch_size"]
    assert "../outs" not in text and f"| MILAN | ViT-tiny/8 | {epochs} | {batch} | 13.0 (12.0–14.0) |" in text
    assert (out / "table.csv").read_text().splitlines()[:2] == [
        "variant,seed,linear,knn,zero_shot,zero_shot_masked,attentive,finetune,corrupted,miou,dense",
        "mae,0,10.0,10.0,,,10.0,10.0,,10.0,10.0",
    ]
    assert (out / "claims.csv").read_text().splitlines()[1].endswith(",3.0,0.5159,5.4841,3,supported")
    assert yaml.safe_load((out / "dvc.lock").read_text())["stages"] == {"teacher": {"cmd": "t"}}
    assert yaml.safe_load((out / "params.yaml").read_text()) == tree
    assert (out / "figure.png").stat().st_size > 10_000
