"""Links in MLflow: from a run to its data, its model and the runs it builds on; from dvc.lock to the run."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pytest
import yaml

from milan.data import records
from milan.data.records import Records
from milan.report import compare
from milan.stage import Stage
from milan.tracking import logger, runs, tracker
from milan.tracking.store import follow_project
from tests.conftest import ROOT, write_split
from tests.tracking.test_tracker import write_spool

DATA = Path("outs/test/imagenet")
ENCODER = Path("outs/test/pretrain/milan-0")
TABLE, REPORT = "reports/table.csv", {"dvc:reports": "7a", "dvc:reports/metrics": "8"}


def write_ended(place: int, pipeline: str, name: str, tags: dict, *events: dict) -> None:
    """Write the spool of a stage that has ended."""
    stage, *variation = name.split()
    known = {"stage": stage, "scale": "test", "git_revision": "abc", **dict(zip(("variant", "_", "seed"), variation))}
    whole = {"experiment": "milan-test", "pipeline": pipeline, "recipe": {"scale": "test"}}
    spool = write_spool([{"kind": "start", "time": 1000 + place, "name": name, "tags": known, **whole}], place)
    for event in (*events, {"kind": "tags", "values": tags}, {"kind": "end", "status": "FINISHED"}):
        tracker.Tracker(spool).event(**event)


def top1(stage: str, value: float) -> list[dict]:
    evaluates = {"kind": "evaluates", "digest": tracker.dvc_hash(ENCODER)}
    curve = {"kind": "metrics", "step": 7, "values": {"train/loss": 3.0}}
    return [evaluates, curve, {"kind": "metrics", "step": 0, "values": {f"{stage}/top1": value}, "result": True}]


def datasets(*splits: Records) -> list[dict]:
    return [{"kind": "dataset", **split.about()} for split in splits]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Run all stages, then fine-tuning and the report alone, as DVC would. Yields the client."""
    folder = tmp_path_factory.mktemp("lineage")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        train = [{"image": b"x", "name": str(i), "label": i % 2} for i in range(5)]
        splits = {name: write_split(DATA, name, rows, 3) for name, rows in {"train": train, "val": train[:2]}.items()}
        records.write_manifest(DATA, splits=splits, classes=["cat", "dog"], source="/home/alice/images")
        ENCODER.mkdir(parents=True)
        (ENCODER / "encoder.safetensors").write_bytes(b"weights")
        made, data = tracker.dvc_hash(ENCODER), tracker.dvc_hash(DATA)

        ours = {f"dvc:{DATA}": data, f"dvc:{ENCODER}": made}
        model = {"kind": "model", "name": "milan-0", "digest": made}
        write_ended(11, "1-1", "pretrain milan seed 0", {**ours, f"dvc:{ENCODER}": "of another recipe"})
        write_ended(12, "2-2", "pretrain milan seed 0", ours, model)
        write_ended(13, "2-2", "pretrain mae seed 0", {f"dvc:{DATA}": data, "dvc:outs/test/pretrain/mae-0": "2"})
        write_ended(14, "2-2", "linear_eval milan seed 0", {**ours, "dvc:metrics.json": "3"}, *top1("linear_eval", 30.0))
        write_ended(15, "2-2", "report", REPORT)
        write_ended(10, "1-1", "pretrain milan seed 7", {f"dvc:{DATA}": data, "dvc:outs/test/pretrain/milan-7": "9"})
        logger.serve(None)
        lock(
            {
                "pretrain@milan-0": ({DATA: data}, {ENCODER: made}),
                "pretrain@milan-7": ({DATA: data}, {"outs/test/pretrain/milan-7": "9"}),
                "pretrain@mae-0": ({DATA: data}, {"outs/test/pretrain/mae-0": "never seen here"}),
                "linear_eval@milan-0": ({DATA: data, ENCODER: made, "milan/evaluation/linear.py": "4"}, {"metrics.json": "3"}),
                "finetune@milan-0": ({DATA: data, ENCODER: made}, {"outs/test/finetune/milan-0": "5"}),
                "report": ({"reports/metrics": "8"}, {TABLE: "6"}),
            }
        )
        both = datasets(Records(DATA, "train"), Records(DATA, "val"))
        write_ended(16, "3-3", "finetune milan seed 0", ours, *both, *top1("finetune", 34.5))
        write_ended(17, "3-3", "report", REPORT)
        logger.serve(None)
        yield mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")


def lock(stages: dict) -> None:
    def items(hashes: dict) -> list[dict]:
        return [{"path": str(path), "hash": "md5", "md5": digest, "size": 1} for path, digest in hashes.items()]

    Path("params.yaml").write_text(yaml.safe_dump({"variants": ["mae", "milan"], "seeds": [0]}))
    entries = {name: {"cmd": "python", "deps": items(deps), "outs": items(outs)} for name, (deps, outs) in stages.items()}
    Path("dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": entries}))


def experiment(store) -> str:
    return store.get_experiment_by_name("milan-test").experiment_id


def named(store, name: str, pipeline: str):
    parent = store.search_runs([experiment(store)], f"tags.pipeline = '{pipeline}'")[0]
    children = store.search_runs([experiment(store)], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    return next(run for run in children if run.info.run_name == name)


def test_a_run_lists_its_datasets(store):
    inputs = {i.dataset.name: i for i in named(store, "finetune milan seed 0", "3-3").inputs.dataset_inputs}
    assert {name: i.tags[0].value for name, i in inputs.items()} == {"imagenet train": "training", "imagenet val": "validation"}
    train = inputs["imagenet train"].dataset
    assert json.loads(train.profile) == {"num_rows": 5, "num_classes": 2, "classes": ["cat", "dog"]}
    columns = {column["name"]: column["type"] for column in json.loads(train.schema)["mlflow_colspec"]}
    assert columns == {"image": "binary", "name": "string", "label": "integer"}
    assert mlflow.data.get_source(train).uri == "outs/test/imagenet"
    assert "alice" not in str(inputs)


def test_a_dataset_s_digest_depends_on_its_images(store, tmp_path):
    rows = [{"image": b"x", "name": str(i), "label": i % 2} for i in range(5)]
    for folder, image in (("same", b"x"), ("other", b"y")):
        splits = {"train": write_split(tmp_path / folder, "train", [*rows[:4], {**rows[4], "image": image}], 3)}
        records.write_manifest(tmp_path / folder, splits=splits, classes=["cat", "dog"], source="elsewhere")
    first, same, other = (Records(folder, "train").about()["digest"] for folder in (DATA, tmp_path / "same", tmp_path / "other"))
    assert first == same != other


def test_a_model_has_the_results_of_all_its_evaluations(store):
    """Also those of a later execution, in which pretraining was skipped; but not their training curves."""
    (model,) = store.search_logged_models([experiment(store)])
    assert {m.key: m.value for m in model.metrics} == {"linear_eval/top1": 30.0, "finetune/top1": 34.5}
    assert {m.run_id for m in model.metrics} == {
        named(store, "linear_eval milan seed 0", "2-2").info.run_id,
        named(store, "finetune milan seed 0", "3-3").info.run_id,
    }
    assert model.source_run_id == named(store, "pretrain milan seed 0", "2-2").info.run_id
    run = store.get_run(named(store, "finetune milan seed 0", "3-3").info.run_id)
    assert [link.model_id for link in run.inputs.model_inputs] == [model.model_id]
    assert run.data.tags["mlflow.note.content"] == "`finetune/top1` 34.5"


def skipped(store, pipeline: str) -> tuple[dict, str]:
    tags = store.search_runs([experiment(store)], f"tags.pipeline = '{pipeline}'")[0].data.tags
    return {key[8:]: run for key, run in tags.items() if key.startswith("skipped.")}, tags.get("mlflow.note.content", "")


def test_a_parent_links_the_runs_of_the_stages_that_dvc_skipped(store):
    """It links neither a run of another recipe, nor mae's, whose result was made elsewhere, nor one of a seed that the
    recipe no longer has, nor stages that were executed."""
    pretrain, probe = (named(store, f"{stage} milan seed 0", "2-2").info for stage in ("pretrain", "linear_eval"))
    tags, note = skipped(store, "3-3")
    assert tags == {"pretrain milan seed 0": pretrain.run_id, "linear_eval milan seed 0": probe.run_id}
    assert note.splitlines()[2:] == [
        f"- [linear_eval milan seed 0](#/experiments/{probe.experiment_id}/runs/{probe.run_id})",
        f"- [pretrain milan seed 0](#/experiments/{probe.experiment_id}/runs/{pretrain.run_id})",
    ]


def test_a_moved_project_takes_its_artifacts_along(store, tmp_path, monkeypatch):
    """After `python -m milan.tracking.logger`, runs, models and versions that are served name the new folder; nothing is written to the old one."""
    before, after = Path.cwd(), tmp_path / "new name"
    (model,) = store.search_logged_models([experiment(store)])
    store.create_registered_model("classifier")
    store.create_model_version("classifier", f"models:/{model.model_id}", model.source_run_id, model_id=model.model_id)
    after.mkdir()
    shutil.copy("mlflow.db", after)
    monkeypatch.chdir(after)
    for _ in range(2):
        logger.serve(None)
    moved = mlflow.MlflowClient(f"sqlite:///{after}/mlflow.db")
    places = [
        moved.get_experiment(experiment(store)).artifact_location,
        moved.get_run(model.source_run_id).info.artifact_uri,
        moved.get_logged_model(model.model_id).artifact_location,
        moved.get_model_version_download_uri("classifier", "1"),
    ]
    assert all(place.startswith(f"{after.as_uri()}/mlartifacts/milan-test") for place in places), places
    moved.log_artifact(model.source_run_id, before / "dvc.lock", "kept")
    assert list(after.glob("mlartifacts/**/kept/dvc.lock")) and not list(before.glob("mlartifacts/**/kept/dvc.lock"))
    follow_project(tmp_path / "without a store")


def test_a_parent_that_executed_all_stages_links_nothing(store):
    assert skipped(store, "2-2") == ({}, "")


def test_pretrained_models_side_by_side(store):
    """The table has the results, and of the recipe only keys that differ; the number of processes has no column."""
    lacking = ("k-NN", "Zero-shot", "Zero-shot, masked", "Attentive probe", "Corrupted top-1", "ADE20K mIoU", "Dense probe mIoU")
    none = dict.fromkeys(lacking)
    (row,) = compare.pretrained_models(store, "test").to_dict("records")
    assert row == {"model": "milan-0", "Linear eval": 30.0, "Fine-tuning": 34.5, **none}
    assert compare.pretrained_models(store, "of nobody").empty
    models = [SimpleNamespace(name=name, metrics=[], source_run_id=name) for name in "ab"]
    made, whole = [], []
    for name, ratio in (("a", "0.5"), ("b", "0.75")):
        params = {"pretrain.mask_ratio": ratio, "pretrain.epochs": "16", "runtime.processes": ratio}
        data = SimpleNamespace(tags={"mlflow.parentRunId": f"of {name}"}, params=params, metrics={"wall_seconds": 90.0})
        made.append(SimpleNamespace(info=SimpleNamespace(run_id=name), data=data))
        world = SimpleNamespace(params={"prepare_imagenet.world": name})
        whole.append(SimpleNamespace(info=SimpleNamespace(run_id=f"of {name}"), data=world))
    asked = {"search_logged_models": lambda _: models, "search_runs": lambda _, text: whole if "pipeline" in text else made}
    fake = SimpleNamespace(get_experiment_by_name=store.get_experiment_by_name, **asked)
    rows = compare.pretrained_models(fake, "test").to_dict("records")
    assert [(row["model"], row["minutes"], row["-S pretrain.mask_ratio"]) for row in rows] == [("a", 1.5, "0.5"), ("b", 1.5, "0.75")]
    assert [row["-S prepare_imagenet.world"] for row in rows] == ["a", "b"], "a setting of another stage, from the pipeline's run"
    assert not any("epochs" in name or "processes" in name for name in rows[0])


def test_the_notebook_says_when_the_store_is_out_of_reach(tmp_path, monkeypatch, store):
    assert "| milan-0 | 30.0 | – | – | – | – | 34.5 | – |" in compare.markdown("test")
    assert compare.markdown("smoke") == "MLflow has no pretrained model of the experiment milan-smoke yet."
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/nowhere.db")
    assert "nowhere.db" in compare.markdown("test") and "no runs are compared" in compare.markdown("test")


def test_from_dvc_lock_to_the_runs(store):
    """The runs that made the path and those that read it, newest first."""
    names = [run.info.run_name for run in runs.find_runs(str(ENCODER))]
    assert names == ["finetune milan seed 0", "linear_eval milan seed 0", "pretrain milan seed 0"]


def test_a_path_that_is_not_in_dvc_lock(store):
    command = [sys.executable, "-m", "milan.tracking.runs", "outs/test/nothing"]
    done = subprocess.run(command, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: dvc.lock names no outs/test/nothing")


LOCKED = "stages: {a: {outs: [{path: outs/x, md5: 1f}]}}"
MERGE = "<<<<<<< HEAD\nstages: {}\n=======\nstages: {}\n>>>>>>> theirs\n"


def refused(workplace: Path, monkeypatch, lock: str, uri: str) -> str:
    """Run `python -m milan.tracking.runs outs/x`, check that it writes nothing, and return its message."""
    Path("dvc.lock").write_text(lock)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    before = sorted(workplace.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        runs.main(["outs/x"])
    assert sorted(workplace.rglob("*")) == before
    return ended.value.code


@pytest.mark.parametrize("lock", [MERGE, "- a list", "stages: [a]", "stages: {a: {outs: [{md5: 1}]}}", "stages: {a: 3}"])
def test_a_damaged_lock_is_named(workplace, monkeypatch, lock):
    assert refused(workplace, monkeypatch, lock, "sqlite:///none.db").startswith("error: dvc.lock is damaged")


@pytest.mark.parametrize("uri, message", [
    ("sqlite:///none.db", "there is no none.db"),
    ("sqlite:///broken.db", "cannot be read"),
    ("nonsense://x", "cannot be read"),
    ("http://[x", "cannot be read"),
    ("http://127.0.0.1:9", "cannot be read"),
])  # fmt: skip
def test_a_missing_or_broken_store_is_named(workplace, monkeypatch, uri, message):
    Path("broken.db").write_text("no database, and long enough to see that it is none " * 100)
    text = refused(workplace, monkeypatch, LOCKED, uri)
    assert message in text and "MLFLOW_TRACKING_URI" in text and "\n" not in text


def test_a_path_without_a_run_is_named(store, monkeypatch):
    monkeypatch.setattr(runs, "lock_hashes", lambda: {"a": {"outs/x": "of nobody"}})
    with pytest.raises(SystemExit, match="error: MLflow has no run that made or read outs/x"):
        runs.main(["outs/x/"])


def test_runs_and_stages_have_the_same_titles(tree):
    for name, args in {"pretrain@clip_target-3": {"variant": "clip_target", "seed": 3}, "report": {}}.items():
        params = SimpleNamespace(pretrain=SimpleNamespace(ablation=["clip_target"]))
        assert runs.title(name) == Stage(name.split("@")[0], SimpleNamespace(**args), params).title
