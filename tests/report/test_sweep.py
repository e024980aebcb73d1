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
    """Of seeds 0, 1, ...: the value, and above it 1, 2, ... for the further measures."""
    found = {}
    for seed, value in enumerate(values):
        for more, (stage, name) in enumerate(MEASURES.values()):
            found.setdefault((stage, variant, seed), {})[name] = value + more
    return found


@pytest.fixture
def experiment(tree):
    """experiment(name, ratio, metrics, **changes) on the committed recipe with variant milan."""

    def made(name: str, ratio: float, found: dict, **changes) -> sweep.Experiment:
        recipe = copy.deepcopy(tree)
        for place, value in {"variants": ["milan"], KEY: ratio, **{k.replace("__", "."): v for k, v in changes.items()}}.items():
            change(recipe, place, value)
        return sweep.Experiment(name, recipe, found, lock=LOCK)

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
    assert "| 0.5 | 31.5 (30.0–33.0) | 32.5 (31.0–34.0) | 33.5 (32.0–35.0) | 34.5 (33.0–36.0) | 13 | 20 | 90 | one |" in own
    assert "| 0.75 | 40.2 | 41.2 |" in own
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


def test_zero_shot_stands_in_the_table_where_somebody_has_it(experiment, tmp_path):
    asked = metrics("milan", 40.0)
    asked["linear_eval", "milan", 0] |= {"linear_eval/zero_shot_top1": 7.5, "linear_eval/zero_shot_masked_top1": 6.25}
    sweep.write(KEY, [experiment("one", 0.5, metrics("milan", 30.0)), experiment("two", 0.75, asked)], [], tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert f"| {KEY} | Linear eval | k-NN | Zero-shot | Zero-shot, masked | Fine-tuning | mIoU |" in text
    assert "| 0.5 | 30.0 | 31.0 | – | – | 32.0 |" in text and "| 0.75 | 40.0 | 41.0 | 7.5 | 6.2 | 42.0 |" in text


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


def test_an_experiment_is_read_from_git(tree, workplace):
    change(tree, "variants", ["milan"])
    Path("params.yaml").write_text(yaml.safe_dump(tree))
    folder = Path("reports/metrics/demo/finetune")
    folder.mkdir(parents=True)
    (folder / "milan-0.json").write_text(json.dumps({"finetune/top1": 12.5}))
    (folder / "mae-0.json").write_text("of no variant")
    Path("dvc.lock").write_text("schema: '2.0'\nstages: {teacher: {cmd: t}, pretrain@mae-0: {cmd: m}}")
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    for command in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-qm", "results"]):
        subprocess.run(["git", *command], check=True)
    (folder / "milan-0.json").write_text("changed since")
    found = sweep.read_experiment("name", "HEAD")
    assert found.recipe == tree and found.metrics == {("finetune", "milan", 0): {"finetune/top1": 12.5}}
    assert found.lock == {"teacher": {"cmd": "t"}}
