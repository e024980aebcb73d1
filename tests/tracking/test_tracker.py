"""Tracking: a stage's events reach MLflow exactly once, also after an outage, and never delay the stage."""

import fcntl
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import psutil
import pytest

from milan.core.code import closure
from milan.core.locks import lock
from milan.tracking import logger, sender, tracker
from tests.conftest import ROOT
from tests.stages.test_dvc import STAGES

OUT_OF_REACH = "http://127.0.0.1:9"


def start_logger(name: str) -> tracker.LoggerProcess:
    tags = {"stage": name, "scale": "test", "git_revision": "abc", "dvc_experiment": "half"}
    own = {"pretrain.lr": 0.5, "seeds": [0, 1]}
    recipe = {"scale": "test", **own, "finetune.lr": 0.1, "data.imagenet": "/pictures/test", "data.name": "test"}
    return tracker.LoggerProcess(name, "milan-test", tags, recipe, own)


def write_spool(events: list[dict], place: int = 1) -> Path:
    """Write the spool of a stage that has ended or died; `place` orders spools."""
    tracker.SPOOLS.mkdir(parents=True, exist_ok=True)
    spool = tracker.SPOOLS / f"{place}-1.jsonl"
    spool.write_text("".join(json.dumps({"time": 1000, **event}) + "\n" for event in events))
    return spool


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Run three stages in one folder. The first finds MLflow out of reach; the second died without an end event; the third
    has the default store, a file, and delivers all. Yields (folder, client, kinds of files left by the first)."""
    folder = tmp_path_factory.mktemp("tracking")
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    patch.setenv("PYTHONPATH", str(ROOT))
    patch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (folder / "conf/scale").mkdir(parents=True)
    (folder / "conf/config.yaml").write_text("defaults: [_self_, {scale: test}]")
    (folder / "conf/scale/test.yaml").write_text(
        "# @package _global_\n{scale: test, pretrain: {lr: 0.25}, seeds: [0, 1], finetune: {lr: 1e-1}}"
    )
    with patch.context() as unreachable:
        unreachable.setenv("MLFLOW_TRACKING_URI", OUT_OF_REACH)
        first = start_logger("first")
    first.tracker.point({"step": 1, "loss": 0.5, "lr": 0.1})
    (folder / "table.md").write_text("| a |\n")
    first.tracker.artifact(Path("table.md"), "report")
    first.tracker.point({"step": 2, "loss": 0.25, "lr": 0.2})
    first.finish("FINISHED")
    first.process.wait(90)
    kept = sorted(path.suffix for path in tracker.SPOOLS.glob("*-*"))

    start = json.loads(first.tracker.spool.read_text().splitlines()[0])
    killed = {**start, "name": "second"}
    write_spool([killed, {"kind": "metrics", "step": 7, "values": {"train/loss": 3.0}}], place=time.time_ns())

    last = start_logger("third")
    Path("weights").mkdir()
    Path("weights/w").write_text("w")
    last.tracker.model(Path("weights"), "milan-0")
    last.tracker.event("tags", values={"dvc:weights": "digest"})
    last.tracker.event("metrics", step=0, values={"linear_eval/top1": 34.5})
    last.tracker.text("step,loss\n", "curve-third.csv")
    last.tracker.pipeline.event("metrics", step=0, values={"linear/milan": 34.5})
    last.tracker.pipeline.text("| b |\n", "table.md")
    last.tracker.pipeline.artifact(Path("table.md"), "report")
    last.finish("FINISHED", wait=True)
    yield folder, mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db"), kept
    patch.undo()


def named(store, name: str):
    """Return the only run of this name."""
    _, client, _ = store
    experiment = client.get_experiment_by_name("milan-test").experiment_id
    (match,) = [run for run in client.search_runs([experiment]) if run.info.run_name == name]
    return match


def history(store, name: str, metric: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in store[1].get_metric_history(named(store, name).info.run_id, metric)]


def test_an_outage_keeps_all_events_and_is_logged(store):
    assert store[2] == [".failed", ".jsonl"]
    assert "MLflow cannot be reached" in (store[0] / tracker.LOG).read_text()


def test_the_next_logger_delivers_kept_events_exactly_once(store):
    assert history(store, "first", "train/loss") == [(1, 0.5), (2, 0.25)]
    assert history(store, "first", "train/lr") == [(1, 0.1), (2, 0.2)]
    run = named(store, "first")
    assert run.info.status == "FINISHED"
    assert {k: run.data.params[k] for k in ("pretrain.lr", "seeds")} == {"pretrain.lr": "0.5", "seeds": "[0, 1]"}
    assert [file.path for file in store[1].list_artifacts(run.info.run_id, "report")] == ["report/table.md"]


def test_no_spool_is_left(store):
    assert [path.name for path in (store[0] / tracker.SPOOLS).glob("*-*")] == []


def test_a_stage_that_died_is_a_killed_run_with_its_events(store):
    assert named(store, "second").info.status == "KILLED"
    assert history(store, "second", "train/loss") == [(7, 3.0)]


def test_a_stage_is_a_run_under_its_pipeline_s_run(store):
    run = named(store, "third")
    parent = store[1].get_run(run.data.tags["mlflow.parentRunId"])
    assert parent.data.tags["pipeline"] == tracker.pipeline_execution()
    assert parent.info.status == "FINISHED"
    assert {named(store, name).data.tags["mlflow.parentRunId"] for name in ("first", "second", "third")} == {parent.info.run_id}
    assert (run.info.status, run.data.tags["stage"], run.data.tags["scale"], run.data.tags["git_revision"]) == (
        "FINISHED",
        "third",
        "test",
        "abc",
    )
    assert run.data.tags["dvc:weights"] == "digest"
    assert history(store, "third", "linear_eval/top1") == [(0, 34.5)]


def test_a_pipeline_s_run_says_what_differs_and_what_came_out(store):
    """Its stages' settings differ from conf/scale/test.yaml in one. What a stage logs to the pipeline is not in its own run."""
    _, client, _ = store
    run = named(store, "third")
    parent = client.get_run(run.data.tags["mlflow.parentRunId"])
    assert re.fullmatch(r"pretrain\.lr=0\.5 · \d\d:\d\d", parent.info.run_name)
    of_data = {"data.imagenet": "/pictures/test", "data.name": "test"}  # not in the name: the experiment has it
    assert parent.data.params == {"scale": "test", "pretrain.lr": "0.5", **of_data}
    assert parent.data.metrics == {"linear/milan": 34.5} and "linear/milan" not in run.data.metrics
    assert (parent.data.tags["scale"], parent.data.tags["dvc_experiment"]) == ("test", "half")
    of_parent, of_stage = ({file.path for file in client.list_artifacts(each.info.run_id)} for each in (parent, run))
    assert of_parent == {"table.md", "report"} and of_stage == {"curve-third.csv", "weights"}
    assert mlflow.artifacts.load_text(f"{parent.info.artifact_uri}/table.md") == "| b |\n"


def test_weights_are_a_model_of_their_run(store):
    _, client, _ = store
    run = named(store, "third")
    (model,) = client.search_logged_models([run.info.experiment_id])
    assert (model.name, model.source_run_id, str(model.status)) == ("milan-0", run.info.run_id, "READY")
    assert model.tags["dvc"].endswith(".dir")
    assert [file.path for file in client.list_artifacts(run.info.run_id, "weights/weights")] == ["weights/weights/w"]


# Without MLflow: every event once, in order.


class FakeSender:
    """A sender that keeps events in a list and fails at an event of the kind fail_at."""

    sent: list = []
    fail_at: str | None = None
    refuse: Exception | None = None

    def __init__(self, *state):
        self.run_id, self.model_id = (*state, None)[:2]

    def send(self, events: list[dict]) -> None:
        if any(event["kind"] == FakeSender.fail_at for event in events):
            raise ConnectionError("the store is gone")
        if FakeSender.refuse:
            raise FakeSender.refuse
        FakeSender.sent += [event.get("value", event["kind"]) for event in events]
        self.run_id = "run"


@pytest.fixture
def fake(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(sender, "Sender", FakeSender)
    FakeSender.sent, FakeSender.fail_at, FakeSender.refuse = [], None, None
    return FakeSender


def point(value: int) -> dict:
    return {"kind": "metrics", "value": value}


def test_a_half_sent_spool_is_continued(fake):
    """The store fails after two events; a later logger sends the rest, and nothing twice."""
    spool = write_spool([{"kind": "start"}, point(1)])
    FakeSender.fail_at = "end"
    logger.deliver(spool)
    assert FakeSender.sent == ["start", 1] and spool.with_suffix(".failed").exists()
    with open(spool, "a") as file:
        file.write(
            json.dumps({**point(2), "time": 1}) + "\n" + json.dumps({"kind": "end", "status": "FINISHED", "time": 1}) + "\n"
        )
    FakeSender.fail_at = None
    logger.deliver(spool)
    assert FakeSender.sent == ["start", 1, 2, "end"]
    assert list(tracker.SPOOLS.iterdir()) == []


def test_events_sent_before_an_outage_are_not_sent_again(fake):
    """The store fails in the middle of the events that the logger read at once."""
    spool = write_spool([{"kind": "start"}, point(1), point(2), {"kind": "tags"}, {"kind": "end"}])
    FakeSender.fail_at = "tags"
    logger.deliver(spool)
    FakeSender.fail_at = None
    logger.deliver(spool)
    assert FakeSender.sent == ["start", 1, 2, "tags", "end"] and not spool.exists()


def test_the_last_events_of_a_stage_are_sent(fake, monkeypatch):
    """The stage writes them while the logger checks whether it is alive."""
    spool = write_spool([{"kind": "start"}])
    alive = [True, True, False]

    def check_alive(_):
        if not alive[1:]:
            with open(spool, "a") as file:
                file.write(json.dumps({"kind": "end", "value": "FINISHED"}) + "\n")
        return alive.pop(0)

    monkeypatch.setattr(logger, "stage_alive", check_alive)
    logger.deliver(spool)
    assert FakeSender.sent == ["start", "FINISHED"]


def test_a_line_truncated_by_a_kill_is_left_out(fake):
    spool = write_spool([{"kind": "start"}, point(1)])
    with open(spool, "a") as file:
        file.write('{"kind": "metrics", "val')
    logger.deliver(spool)
    assert FakeSender.sent == ["start", 1, "end"] and not spool.exists()


def test_the_logger_waits_for_the_rest_of_a_line(fake, monkeypatch):
    """The stage has written half of the line when the logger reads."""
    spool = write_spool([{"kind": "start"}])
    stage = lock(spool)
    whole = json.dumps({**point(1), "time": 1}) + "\n"
    rest = [whole[:9], whole[9:], json.dumps({"kind": "end", "status": "FINISHED", "time": 1}) + "\n"]

    def meanwhile(_):
        with open(spool, "a") as file:
            file.write(rest.pop(0))

    monkeypatch.setattr(logger.time, "sleep", meanwhile)
    logger.deliver(spool)
    assert FakeSender.sent == ["start", 1, "end"]
    os.close(stage)


def test_a_stage_is_alive_as_long_as_it_locks_its_spool(fake):
    """Also when it is killed and its process number is reused."""
    spool = write_spool([{"kind": "start"}])
    holding = f"import time; from pathlib import Path; from milan.core.locks import lock; lock(Path({str(spool)!r})); print(1, flush=True); time.sleep(60)"
    stage = subprocess.Popen([sys.executable, "-c", holding], env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE)
    stage.stdout.readline()
    assert logger.stage_alive(spool)
    stage.kill()
    stage.wait()
    assert not logger.stage_alive(spool)


def test_spools_are_sent_in_order_and_later_ones_are_left_to_their_own_loggers(fake):
    ended = [{"kind": "end", "status": "FINISHED"}]
    spools = [write_spool([point(place), *ended], place) for place in (11, 12, 13)]
    logger.serve(spools[1])
    assert FakeSender.sent == [11, "end", 12, "end"]
    assert [spool.exists() for spool in spools] == [False, False, True]


def ended_spool(place: int, pipeline: str, **end) -> Path:
    """Write the spool of a stage that has ended."""
    start, end = {"kind": "start", "pipeline": pipeline, "value": f"start {place}"}, {"kind": "end", "value": f"end {place}", **end}
    return write_spool([start, end], place)


def test_a_logger_goes_on_with_the_later_stages_of_its_pipeline(fake, monkeypatch):
    """It leaves stages run by hand, which may have another store. The second stage begins while the logger waits."""
    first, other = ended_spool(11, "7-70"), ended_spool(12, "8-by-hand")
    later = [lambda: None, lambda: ended_spool(13, "7-70"), lambda: ended_spool(14, "7-70", last=True)]
    monkeypatch.setattr(logger, "is_running", lambda pipeline: pipeline == "7-70")
    monkeypatch.setattr(logger.time, "sleep", lambda _: later.pop(0)())
    logger.serve(first)  # raises IndexError if it waits again after the last stage
    assert FakeSender.sent == [f"{word} {place}" for place in (11, 13, 14) for word in ("start", "end")]
    assert other.exists()


def test_a_pipeline_runs_as_long_as_its_dvc_process(fake):
    name = f"{os.getpid()}-{int(psutil.Process().create_time())}"
    assert logger.is_running(name)
    assert not any(map(logger.is_running, [f"{os.getpid()}-1", f"{os.getpid()}-by-hand", "x", "", None]))
    assert logger.pipeline_of(ended_spool(1, name)) == name
    assert logger.pipeline_of(write_spool([point(1)], 2)) is None
    empty = write_spool([], 3)
    assert logger.pipeline_of(empty) is logger.pipeline_of(empty.with_name("none.jsonl")) is None


def test_one_bad_spool_does_not_stop_the_others(fake):
    bad, good = write_spool([{"kind": "bad"}], 11), write_spool([point(2), {"kind": "end"}], 12)
    FakeSender.fail_at = "bad"
    logger.serve(good)
    assert FakeSender.sent == [2, "end"]
    assert bad.exists() and bad.with_suffix(".failed").exists()


def test_a_spool_that_another_logger_delivered_is_skipped(fake):
    spool = write_spool([point(1), {"kind": "end"}])
    spool.unlink()
    logger.serve(spool)
    assert FakeSender.sent == []


def test_without_a_spool_all_kept_spools_are_delivered(fake):
    spools = [write_spool([point(place), {"kind": "end"}], place) for place in (11, 12)]
    spools[0].with_suffix(".failed").touch()
    logger.serve(None)
    assert FakeSender.sent == [11, "end", 12, "end"]
    assert [path.name for path in tracker.SPOOLS.iterdir()] == ["lock"]


def test_the_last_stage_waits_for_a_limited_time(fake, monkeypatch, capsys):
    """Its logger waits for another logger."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(tracker, "DELIVERY_TIMEOUT", 0.2)
    tracker.SPOOLS.mkdir(parents=True)
    with open(tracker.SPOOLS / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        last = start_logger("last")
        last.finish("FINISHED", wait=True)
        assert last.process.poll() is None
        assert "its logger goes on in the background" in capsys.readouterr().err
        last.process.kill()
        last.process.wait()


def test_a_stage_in_a_temporary_workspace_leaves_what_mlflow_did_not_take_to_the_project(fake, monkeypatch):
    """DVC deletes the workspace; artifacts are named by absolute paths, so that none of the project's is taken for them."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", OUT_OF_REACH)
    project, workspace = Path.cwd(), Path(".dvc/tmp/exps/standalone/tmp1").absolute()
    workspace.mkdir(parents=True)
    monkeypatch.chdir(workspace)
    stage = start_logger("queued")
    stage.tracker.artifact(Path("curve.csv"))
    stage.finish("FINISHED")
    assert stage.process.poll() is not None, "it waited for its logger"
    assert not list(tracker.SPOOLS.glob("*-*"))
    monkeypatch.chdir(project)
    assert sorted(path.suffix for path in tracker.SPOOLS.glob("*-*")) == [".failed", ".jsonl"]
    (spool,) = tracker.SPOOLS.glob("*.jsonl")
    assert json.loads(spool.read_text().splitlines()[2])["path"] == str(workspace / "curve.csv")


def test_earlier_failures_are_reported(fake, capsys):
    tracker.SPOOLS.mkdir(parents=True)
    tracker.warn_of_undelivered()
    assert capsys.readouterr().err == ""
    for name, reason in (("1-2", "MLflow says (E): no"), ("2-2", "MLflow cannot be reached"), ("3-2", "MLflow says (E): no")):
        (tracker.SPOOLS / f"{name}.failed").write_text(reason)
    tracker.warn_of_undelivered()
    said = capsys.readouterr().err
    assert said.startswith("3 run(s) have not arrived. MLflow says (E): no. MLflow cannot be reached. Their events are kept")


def test_what_mlflow_refuses_is_said_in_its_own_words(fake, capsys):
    spool = write_spool([{"kind": "start"}])
    fake.refuse = mlflow.MlflowException("Invalid alias name: 'a.b'.\nNames may ...", error_code=1000)
    logger.deliver(spool)
    reason = "MLflow says (MlflowException): Invalid alias name: 'a.b'. Names may"
    assert spool.with_suffix(".failed").read_text() == reason and reason in capsys.readouterr().out
    assert spool.exists()


def test_a_deleted_experiment_is_named_with_the_command_that_restores_it(store, monkeypatch):
    """Nothing of the run is lost: it arrives once the experiment is restored."""
    folder, client, _ = store
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    number = client.create_experiment("milan-gone")
    client.delete_experiment(number)
    start = {"kind": "start", "name": "late", "experiment": "milan-gone", "pipeline": "9-9", "recipe": {}, "tags": {"stage": "late", "scale": "test"}}
    odd = {"dvc:my (own).csv": "1", "dvc:reports/a b.csv": "2"}
    spool = write_spool([start, {"kind": "tags", "values": odd}, {"kind": "end", "status": "FINISHED"}])
    assert not logger.deliver(spool)
    assert f"`mlflow experiments restore --experiment-id {number}`" in spool.with_suffix(".failed").read_text()
    client.restore_experiment(number)
    assert logger.deliver(spool) and not spool.with_suffix(".failed").exists()
    (run,) = client.search_runs([number], "attributes.run_name = 'late'")
    assert {key: value for key, value in run.data.tags.items() if key.startswith("dvc:")} == {"dvc:reports/a b.csv": "2"}


def test_no_stage_needs_mlflow(monkeypatch):
    """The logger process and the served model import mlflow; of the stages only the page does, and it runs without a store."""
    importing = {path.relative_to(ROOT).as_posix() for path in (ROOT / "milan").rglob("*.py") if re.search(r"^\s*(import|from) mlflow", path.read_text(), re.M)}
    assert importing == {"milan/tracking/runs.py", "milan/tracking/sender.py", "milan/serve/serving.py"}
    monkeypatch.chdir(ROOT)
    for stage in set(STAGES) - {"page"}:
        assert not {Path(name) for name in importing} & closure(Path("stages", f"{stage}.py"))
    code = "import sys, milan.stage, milan.tracking.tracker; print('mlflow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
