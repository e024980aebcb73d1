"""Sweeps: which experiments belong together, and their numbers by hand."""

import copy
import json
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import yaml

from milan.core.errors import UserError
from milan.report import costs, sweep
from milan.report.provenance import StageRun
from milan.report.results import MEASURES
from tests.conftest import change

KEY = "pretrain.mask_ratio"
LOCK = {
    "extract_targets": {"outs": [{"path": "outs/demo/targets", "md5": "t.dir", "size": 12_600_000}]},
    "pretrain@milan-0": {"deps": [{"path": "outs/demo/targets", "md5": "t.dir"}], "outs": [{"path": "w", "md5": "w.dir"}]},
}


def known(stage: str, seconds: float, hardware: str = "a small machine", **tags: str) -> StageRun:
    digests = {"dvc:outs/demo/targets": "t.dir", **({} if stage == "extract_targets" else {"dvc:w": "w.dir"})}
    return StageRun("id", 0, seconds, {"stage": stage, "git_revision": "0123456789abcdef", "hardware": hardware, **digests, **tags})


RUNS = [known("extract_targets", 20.4), known("pretrain", 90.0, variant="milan", seed="0")]


def metrics(variant: str, *values: float) -> dict:
    """Return the metrics of seeds 0, 1, ...: the value for the first measure, and 1, 2, ... above it for the others."""
    files = {}
    for seed, value in enumerate(values):
        for more, (stage, name) in enumerate(MEASURES.values()):
            files.setdefault(f"{stage}/{variant}-{seed}.json", {})[name] = value + more
    return files


@pytest.fixture
def experiment(tree):
    """experiment(name, ratio, metrics, **changes) on the committed recipe with variant milan."""

    def made(name: str, ratio: float, numbers: dict, **changes) -> sweep.Experiment:
        recipe = copy.deepcopy(tree)
        for place, value in {"variants": ["milan"], KEY: ratio, **{k.replace("__", "."): v for k, v in changes.items()}}.items():
            change(recipe, place, value)
        return sweep.Experiment(name, recipe, numbers, lock=LOCK)

    return made


def names(group: list[sweep.Experiment]) -> list[str]:
    return [e.name for e in group]


def test_a_sweep_is_what_differs_in_its_key_alone(experiment):
    some = [
        experiment("half", 0.5, {}),
        experiment("other lr", 0.6, {}, pretrain__lr=0.5),
        experiment("seeds", 0.9, {}, seeds=[0, 1], runtime__workers=3),
    ]
    found, others = sweep.members(KEY, some)
    assert names(found) == ["half", "seeds"] and names(others) == ["other lr"]


def test_other_data_is_no_part_of_a_sweep(experiment):
    """Nor is its name alone a reason: it moves results and does not change them."""
    own = {"data__imagenet": "/data/flowers", "data__name": "flowers"}
    some = [experiment("a", 0.5, {}), experiment("flowers", 0.6, {}, **own), experiment("named", 0.9, {}, data__name="mine")]
    found, others = sweep.members(KEY, some)
    assert names(found) == ["a", "named"] and names(others) == ["flowers"]


def test_of_equal_groups_the_newest(experiment):
    some = [experiment("a", 0.5, {}, scale="smoke"), experiment("b", 0.5, {})]
    assert names(sweep.members(KEY, some)[0]) == ["b"]
    assert names(sweep.members(KEY, some[::-1])[0]) == ["a"]


def test_an_unknown_key_is_named_with_its_neighbour(experiment):
    with pytest.raises(
        UserError, match=r"pretrain\.mask_ration: the recipe has no such key; did you mean 'pretrain\.mask_ratio'\?"
    ):
        sweep.members("pretrain.mask_ration", [experiment("a", 0.5, {})])


def test_the_newest_of_a_repeated_value_counts_and_a_failed_one_does_not(experiment):
    some = [
        experiment("old", 0.5, metrics("milan", 10.0)),
        experiment("new", 0.5, metrics("milan", 20.0)),
        experiment("failed", 0.9, {}),
        experiment("low", 0.25, metrics("milan", 5.0)),
    ]
    runs = sweep.rows(KEY, some, [])
    assert runs[["value", "experiment"]].values.tolist() == [[0.25, "low"], [0.5, "new"]]
    assert runs.iloc[1][list(MEASURES)].tolist() == [20.0 + k for k in range(len(MEASURES))]


def test_files_by_hand(experiment, tmp_path):
    some = [
        experiment("one", 0.5, metrics("milan", 30.0, 33.0), seeds=[0, 1]),
        experiment("two", 0.75, {**metrics("milan", 40.25), **metrics("mae", 1.0)}, variants=["mae", "milan"]),  # MAE: once
    ]
    sweep.write(KEY, some, RUNS, tmp_path, "How much?")
    text = (tmp_path / "table.md").read_text()
    assert text.startswith(f"# {KEY} at scale demo\n\nHow much?\n\n## MILAN\n")
    own = text.split("## MILAN")[1]
    assert "| 0.5 | 31.5 (30.0–33.0) | 32.5 (31.0–34.0) | 33.5 (32.0–35.0) | 34.5 (33.0–36.0) | 35.5 (34.0–37.0) | 36.5 (35.0–38.0) | 13 | 20 | 90 | one |" in own
    assert "| 0.75 | 40.3 | 41.3 |" in own
    assert "Made at git revision 0123456789 on a small machine." in own
    found = pd.read_csv(tmp_path / "table.csv")
    assert len(found) == 3 and found.loc[0, ["bank_mb", "targets_seconds", "pretrain_seconds"]].tolist() == [12.6, 20.4, 90]
    assert pd.isna(found.loc[1, "pretrain_seconds"])  # seed 1 has no run
    for e in some:
        assert yaml.safe_load((tmp_path / e.name / "params.yaml").read_text()) == e.recipe
        assert yaml.safe_load((tmp_path / e.name / "dvc.lock").read_text()) == {"schema": "2.0", "stages": LOCK}
    picture = (tmp_path / "figure.png").read_bytes()
    sweep.write(KEY, some, RUNS, tmp_path)
    assert picture == (tmp_path / "figure.png").read_bytes()


def test_costs_are_those_of_the_sweep_s_data(experiment, tmp_path, monkeypatch):
    """The commit's own results may be of other data."""
    smoke = {"scale": "smoke", "data__name": "smoke"}
    points = [experiment(name, ratio, metrics("milan", 1.0), **smoke) for name, ratio in (("a", 0.5), ("b", 0.9))]
    monkeypatch.setattr(sweep, "read_experiments", lambda: [experiment(sweep.HERE, 0.5, {}), *points])
    monkeypatch.setattr(costs, "known_runs", lambda names: RUNS if names == {"smoke"} else [])
    monkeypatch.setattr("sys.argv", ["sweep", KEY, "--out", str(tmp_path)])
    sweep.main()
    assert "| 0.5 | 1.0 | 2.0 | 3.0 | 4.0 | 5.0 | 6.0 | 13 | 20 | 90 | a |" in (tmp_path / KEY / "table.md").read_text()


def test_zero_shot_stands_in_the_table_where_somebody_has_it(experiment, tmp_path):
    asked = metrics("milan", 40.0)
    asked["linear_eval/milan-0.json"] |= {"linear_eval/zero_shot_top1": 7.5, "linear_eval/zero_shot_masked_top1": 6.25}
    sweep.write(KEY, [experiment("one", 0.5, metrics("milan", 30.0)), experiment("two", 0.75, asked)], [], tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert f"| {KEY} | Linear eval | k-NN | Zero-shot | Zero-shot, masked | Attentive probe | Fine-tuning | mIoU |" in text
    assert "| 0.5 | 30.0 | 31.0 | – | – | 32.0 |" in text and "| 0.75 | 40.0 | 41.0 | 7.5 | 6.3 | 42.0 |" in text


def test_what_mlflow_does_not_know_is_a_dash(experiment, tmp_path):
    """The one known run of pretraining wrote other weights; the commit's own recipe and lock are not copied."""
    other = known("pretrain", 90.0, variant="milan", seed="0")
    other.tags["dvc:w"] = "other.dir"
    some = [experiment(sweep.HERE, 0.5, metrics("milan", 30.0)), experiment("two", 0.75, metrics("milan", 40.0))]
    sweep.write(KEY, some, [other], tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert "| 13 | – | – | two |" in text and "MLflow knows no run of these results" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figure.png", "table.csv", "table.md", "two"]


def test_a_part_that_mlflow_knows_is_called_a_part():
    said = costs.said([LOCK], [known("extract_targets", 1.0, "this"), known("extract_targets", 1.0, "that")])
    assert said == "Made at git revision 0123456789 on this (1 of 2 stages are known to MLflow)."


def test_the_lock_keeps_what_made_the_recipe_s_numbers(tree):
    change(tree, "variants", ["milan"])
    stages = ("teacher", "pretrain@milan-0", "pretrain@milan-1", "pretrain@mae-0", "segment@milan-0", "report", "page")
    text = yaml.safe_dump({"schema": "2.0", "stages": {name: {"cmd": name} for name in stages}})
    assert list(sweep.read_lock(text, tree)) == ["pretrain@milan-0", "segment@milan-0", "teacher"]
    assert sweep.read_lock("", tree) == {}


def test_words_are_values_too(experiment, tmp_path):
    key = "extract_targets.normalisation"
    some = [
        experiment(name, 0.5, metrics("milan", n), extract_targets__normalisation=name)
        for n, name in enumerate(("clip", "imagenet"))
    ]
    sweep.write(key, some, [], tmp_path)
    assert "| imagenet | 1.0 |" in (tmp_path / "table.md").read_text()


def test_one_value_is_no_sweep_and_writes_nothing(experiment, tmp_path):
    with pytest.raises(UserError, match=r"at least two values.*dvc exp run --queue -S 'pretrain\.mask_ratio=ONE,OTHER'"):
        sweep.write(KEY, [experiment("a", 0.5, metrics("milan", 1.0)), experiment("b", 0.9, {})], [], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def commit(message: str) -> str:
    """Commit everything; return the revision."""
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    for command in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-qm", message]):
        subprocess.run(["git", *command], check=True)
    return sweep.git("rev-parse", "HEAD").strip()


def state(recipe: dict, revision: str, timestamp: str, metrics: dict) -> dict:
    """An entry of `dvc exp show --json`."""
    data = {"timestamp": timestamp, "params": {"params.yaml": {"data": recipe}}, "metrics": metrics}
    return {"rev": revision, "data": data, "error": None}


@pytest.fixture
def shown(tree, workplace, monkeypatch) -> dict:
    """The commit's entry of `dvc exp show --json`, with experiments made at 2, 1, and one that still runs."""
    change(tree, "variants", ["milan"])
    Path("dvc.lock").write_text("schema: '2.0'\nstages: {teacher: {cmd: t}, pretrain@mae-0: {cmd: m}}")
    revision = commit("a lock")
    metrics = {
        "reports/metrics/demo/finetune/milan-0.json": {"data": {"finetune/top1": 12.5}},
        "reports/metrics/demo/segment/milan-0.json": {"error": {"type": "FileNotFoundError", "msg": "not made"}},
    }
    experiments = [
        {"name": name, "revs": [state(tree, revision, time, metrics)], "executor": executor}
        for name, time, executor in (
            ("new", "2026-11-27T10:19:10", {"state": "success"}),
            ("running", "2026-11-27T10:19:10", {"state": "running"}),
            ("old", "2026-11-27T10:18:10", None),
        )
    ]
    head = {**state(tree, revision, "2026-11-27T10:15:03", {}), "experiments": experiments}
    said = json.dumps([{"rev": "workspace"}, head])
    monkeypatch.setattr(sweep, "dvc", lambda *words, **options: subprocess.CompletedProcess(words, 0, stdout=said))
    return head


def test_finished_experiments_are_read_oldest_first(shown, tree):
    here, old, new = sweep.read_experiments()
    assert (here.name, old.name, new.name) == (sweep.HERE, "old", "new")
    assert here.metrics == {} and new.metrics == {"finetune/milan-0.json": {"finetune/top1": 12.5}}
    assert new.recipe == tree and new.lock == {"teacher": {"cmd": "t"}}


def test_a_project_in_a_folder_of_a_larger_repository_reads_its_own_lock(tree, workplace, monkeypatch):
    change(tree, "variants", ["milan"])
    for folder, stage in (("papers/milan", "teacher"), (".", "another")):
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, "dvc.lock").write_text(f"schema: '2.0'\nstages: {{{stage}: {{cmd: t}}}}")
    revision = commit("two locks")
    monkeypatch.chdir("papers/milan")
    assert sweep.read_experiment("x", state(tree, revision, "2026-11-27T10:19:10", {})).lock == {"teacher": {"cmd": "t"}}


def test_without_a_lock_there_is_none(shown):
    Path("dvc.lock").unlink()
    revision = commit("none")
    assert sweep.read_experiment("x", {**shown, "rev": revision}).lock == {}


def test_a_commit_that_dvc_cannot_read_is_named(shown):
    with pytest.raises(UserError, match="DVC cannot read this commit: dvc.yaml is no YAML"):
        sweep.read_experiment(sweep.HERE, {"data": None, "error": {"msg": "dvc.yaml is no YAML"}})


def test_a_failure_of_dvc_is_named(monkeypatch):
    monkeypatch.setattr(sweep.sys, "executable", "/bin/false")
    with pytest.raises(UserError, match="dvc exp run ended with status 1.*same command again"):
        sweep.dvc("exp", "run")
