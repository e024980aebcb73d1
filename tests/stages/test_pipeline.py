"""The whole pipeline at smoke scale, run by DVC in a fresh clone, as a user runs it."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from milan.params import read_params
from milan.report.reproduction import CHANGES
from milan.stage import filled

ROOT = Path(__file__).resolve().parents[2]
DVC = [sys.executable, "-m", "dvc"]
STAGE_WORDS = "Running stage"
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_WAIT_POLICY": "PASSIVE"}


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """Return a clone after one smoke run of the variant milan (tests/stages/test_variants.py runs the others)."""
    folder = clone_of(tmp_path_factory.mktemp("clone") / "milan")
    first = dvc(folder, "exp", "run", "-S", "scale=smoke", "-S", "variants=[milan]")
    assert "Running stage 'figures'" in first
    assert "No data.imagenet is given: images of the built-in world are drawn, and results go to outs/smoke." in first
    return folder


def clone_of(folder: Path) -> Path:
    """Copy the tracked files as they are now into a new git repository, without results."""
    folder.mkdir()
    names = run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], ROOT).split("\0")
    for name in filter(lambda n: n and (ROOT / n).is_file(), names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    (folder / "dvc.lock").unlink(missing_ok=True)
    for command in (["init", "-q"], ["add", "-A"], ["-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", "clone"]):
        run(["git", *command], folder)
    return folder


def commit(folder: Path) -> None:
    run(["git", "add", "-A"], folder)
    run(["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-q", "--allow-empty", "-m", "results"], folder)


def run(command: list[str], folder: Path, check: bool = True) -> str:
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0 or not check, done.stdout[-4000:]
    return done.stdout


def dvc(folder: Path, *words: str) -> str:
    return run([*DVC, *words], folder)


def lock(folder: Path) -> bytes:
    return (folder / "dvc.lock").read_bytes()


def test_the_table_and_the_figures_are_there(clone):
    table = (clone / "reports/table.md").read_text()
    params = yaml.safe_load((clone / "params.yaml").read_text())
    assert params["scale"] == "smoke"
    for variant in params["variants"]:
        assert variant in table
    assert "85.4" in table and "79.9" in table and "52.7" in table
    assert len(list((clone / "reports/figures").glob("*.png"))) >= 4
    assert "linear_eval/zero_shot_masked_top1" in json.loads((clone / "reports/metrics/smoke/linear_eval/milan-0.json").read_text())


def test_the_page_names_the_run_of_every_stage(clone):
    page, stages = (clone / "reports/index.html").read_text(), yaml.safe_load(lock(clone))["stages"]
    (contents,) = stages.pop("page")["outs"]  # its own, which it cannot know
    assert "not found" not in page and f"for {len(stages)} of {len(stages)} stages" in page
    assert all(out["md5"] in page for stage in stages.values() for out in stage["outs"]) and contents["md5"] not in page


def test_a_second_run_executes_nothing(clone):
    assert STAGE_WORDS not in dvc(clone, "repro")
    assert "up to date" in dvc(clone, "status")


def test_dvc_answers_questions(clone):
    assert "linear_eval/top1" in dvc(clone, "metrics", "show")
    assert "index.html" in dvc(clone, "plots", "show")
    assert "smoke" in dvc(clone, "params", "diff")
    assert "milan" in dvc(clone, "exp", "show", "--csv", "--no-pager")


def test_forced_reruns_leave_the_same_lock(clone):
    """Every stage but pretraining, which the next test runs, and three whose like is here: for time. `make repro` compares all."""
    before = lock(clone)
    elsewhere = ("pretrain@milan-0", "figures", "page")  # the next test; tests/report
    elsewhere += ("attentive_probe@milan-0", "dense_probe@milan-0", "robustness@milan-0")  # as linear_eval, segment, linear_eval
    forced = [stage for stage in yaml.safe_load(before)["stages"] if stage not in elsewhere]
    said = dvc(clone, "repro", "-f", "-s", *forced)
    assert said.count(STAGE_WORDS) == len(forced) == 9
    assert lock(clone) == before


def test_killed_pretraining_continues_to_the_same_weights(clone):
    """Even after edits of code that cannot change them."""
    before = lock(clone)
    kill_pretraining(clone)
    assert not (clone / "outs/smoke/pretrain/milan-0/encoder.safetensors").exists()
    with edited(clone, "milan/tracking/tracker.py", "milan/report/table.py"):
        # Forced, because DVC would take the undisturbed run's weights from its cache.
        said = dvc(clone, "repro", "-f", "-s", "pretrain@milan-0")
    assert "continuing from step" in said and "the code has changed" not in said
    assert lock(clone) == before
    assert not list(clone.glob(".scratch/pretrain-milan-0-*"))


def test_a_state_is_left_by_another_recipe_and_continued_after_an_edit_which_marks_the_result(clone):
    before, metrics = lock(clone), clone / "reports/metrics/smoke/pretrain/milan-0.json"
    clean = json.loads(metrics.read_text())
    kill_pretraining(clone)
    tree = yaml.safe_load((clone / "params.yaml").read_text())
    tree["pretrain"] |= {"lr": tree["pretrain"]["lr"] / 2, "epochs": 1, "warmup_epochs": 0}
    (clone / "other.yaml").write_text(yaml.safe_dump(tree))
    words = filled(yaml.safe_load(lock(clone))["stages"]["pretrain@milan-0"]["cmd"], read_params(clone / "params.yaml"), "@milan-0")
    words = words.replace("$MILAN_LAUNCHER python", sys.executable)
    words = words.replace("outs/smoke/pretrain", "outs/other").replace("reports/", "outs/other-reports/")
    said = run([*words.split(), "--params", "other.yaml"], clone)
    assert "pretrain-milan-0: starts at step 0 and leaves the state of another recipe" in said
    assert "pretrain.lr is 0.0006, was 0.0012" in said and "continuing" not in said
    with edited(clone, "milan/method/masking.py"):
        said = dvc(clone, "repro", "-f", "-s", "pretrain@milan-0")
    assert "continuing from step" in said and "changed since this state was saved (milan/method/masking.py)" in said
    assert json.loads(metrics.read_text()) == {**clean, "edited_while_training": "milan/method/masking.py"}
    (clone / "dvc.lock").write_bytes(before)
    metrics.write_text(json.dumps(clean, indent=1, sort_keys=True) + "\n")
    assert "up to date" in dvc(clone, "status", "pretrain@milan-0")  # the edit is a comment: the weights are the same


def test_an_edit_while_a_stage_runs_makes_it_fail(clone):
    before = lock(clone)
    running = started(clone, "repro", "-f", "-s", "pretrain@milan-0")
    wait_for(lambda: list(clone.glob(".scratch/pretrain-milan-0-*/state-*.pt")), running)
    with edited(clone, "milan/method/masking.py"):
        said, _ = running.communicate()
    assert running.returncode != 0 and lock(clone) == before
    assert "milan/method/masking.py changed while pretrain milan seed 0 ran" in " ".join(said.split())
    assert "continuing from step" in dvc(clone, "repro", "-f", "-s", "pretrain@milan-0")  # no step is repeated
    assert lock(clone) == before


@contextlib.contextmanager
def edited(folder: Path, *names: str):
    """Append a comment to source files within the context."""
    before = {name: (folder / name).read_text() for name in names}
    for name, text in before.items():
        (folder / name).write_text(text + "\n# touched\n")
    yield
    for name, text in before.items():
        (folder / name).write_text(text)


def started(folder: Path, *words: str) -> subprocess.Popen:
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    return subprocess.Popen([*DVC, *words], cwd=folder, env=ENVIRONMENT, **options)


def kill_pretraining(folder: Path) -> None:
    """Start a forced pretraining by DVC, and send kill -9 to both once a state is saved."""
    assert yaml.safe_load((folder / "params.yaml").read_text())["runtime"]["save_seconds"] <= 1
    victim = started(folder, "repro", "-f", "-s", "pretrain@milan-0")
    wait_for(lambda: list(folder.glob(".scratch/pretrain-milan-0-*/state-*.pt")), victim)
    os.killpg(victim.pid, signal.SIGKILL)
    victim.wait()


def runs_module(process: subprocess.Popen, name: str) -> bool:
    """Return whether a process has started `python -m name`, directly or through others."""
    with contextlib.suppress(psutil.Error):  # some end while they are asked
        return any(name in child.cmdline() for child in psutil.Process(process.pid).children(recursive=True))
    return False


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.05)


def test_pushed_results_come_back_in_another_clone(clone, tmp_path):
    """Push to a local remote, clone, pull: everything is up to date."""
    dvc(clone, "remote", "add", "-f", "-d", "store", str(tmp_path / "store"))
    dvc(clone, "push")
    commit(clone)
    other = tmp_path / "other"
    run(["git", "clone", "-q", str(clone), str(other)], tmp_path)
    dvc(other, "pull")
    assert "up to date" in dvc(other, "status")


def test_mlflow_holds_one_parent_with_its_stages(clone):
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{clone}/mlflow.db")
    experiment = client.get_experiment_by_name("milan-smoke")
    runs = client.search_runs([experiment.experiment_id], max_results=500)
    parents = [r for r in runs if "pipeline" in r.data.tags]
    full = [p for p in parents if len(children(runs, p)) == len(yaml.safe_load(lock(clone))["stages"])]
    assert full, "no parent run with a child for each stage"
    milan = next(r for r in children(runs, full[0]) if r.info.run_name == "pretrain milan seed 0")
    assert milan.info.status == "FINISHED"
    losses = client.get_metric_history(milan.info.run_id, "train/loss")
    assert len(losses) >= 10 and losses[0].step < losses[-1].step
    neighbours = client.get_metric_history(milan.info.run_id, "train/knn_top1")
    assert [value.step for value in neighbours] == [10, 20, 30]  # every 2 epochs of 5 steps
    assert milan.data.params["pretrain.mask_ratio"] == "0.75"
    files = {file.path for file in client.list_artifacts(milan.info.run_id, "weights/milan-0")}
    assert "weights/milan-0/encoder.safetensors" in files
    locked = yaml.safe_load(lock(clone))["stages"]["pretrain@milan-0"]["outs"]
    digests = {out["path"]: out["md5"] for out in locked}
    assert milan.data.tags["dvc:outs/smoke/pretrain/milan-0"] == digests["outs/smoke/pretrain/milan-0"]


def test_mlflow_holds_the_classifier_of_dvc_lock(clone):
    """A classifier that was made several times is registered once."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{clone}/mlflow.db")
    outs = yaml.safe_load(lock(clone))["stages"]["finetune@milan-0"]["outs"]
    (digest,) = [out["md5"] for out in outs if out["path"] == "outs/smoke/finetune/milan-0"]
    assert client.get_model_version_by_alias("milan-smoke-classifier", "milan").tags["dvc"] == digest
    made = [version.tags["dvc"] for version in client.search_model_versions("name = 'milan-smoke-classifier'")]
    assert len(set(made)) == len(made)


def test_stages_that_dvc_skips_are_linked_from_the_new_parent(clone):
    import mlflow

    dvc(clone, "repro", "-f", "-s", "report")
    run([sys.executable, "-m", "milan.tracking.logger"], clone)  # waits for the logger of the stage
    client = mlflow.MlflowClient(f"sqlite:///{clone}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("milan-smoke").experiment_id], max_results=500)
    parent = next(r for r in runs if "pipeline" in r.data.tags)
    assert [r.info.run_name for r in children(runs, parent)] == ["report"]
    skipped = {key: client.get_run(value) for key, value in parent.data.tags.items() if key.startswith("skipped.")}
    assert len(skipped) == len(yaml.safe_load(lock(clone))["stages"]) - 1
    for key, earlier in skipped.items():
        assert key == f"skipped.{earlier.info.run_name}" and earlier.info.run_id in parent.data.tags["mlflow.note.content"]
    assert run([sys.executable, "-m", "milan.tracking.runs", "outs/smoke/pretrain/milan-0"], clone).count("pretrain milan seed 0") >= 1


def children(runs: list, parent) -> list:
    return [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]


def test_status_reports_an_edit_at_once(clone):
    """`dvc status` alone reports an edit, and not one that was undone."""
    elsewhere = ("milan/segmentation/miou.py", "milan/evaluation/linear.py", "milan/tracking/tracker.py", "milan/report/table.py")
    with edited(clone, *elsewhere):
        assert "up to date" in dvc(clone, "status", "pretrain@milan-0", "extract_targets", "prepare_imagenet")
        changed = json.loads(dvc(clone, "status", "--json"))
    evaluations = {f"{stage}@milan-0" for stage in ("segment", "dense_probe", "linear_eval", "attentive_probe", "finetune", "robustness")}
    assert set(changed) == {"prepare_ade20k", "teacher", *evaluations, "report", "figures", "page"}
    with edited(clone, "milan/method/model.py"):
        said = dvc(clone, "status", "pretrain@milan-0")
        dry = dvc(clone, "repro", "-s", "--dry", "pretrain@milan-0")
    assert "milan/method" in said and "Running stage 'pretrain@milan-0'" in dry
    assert "up to date" in dvc(clone, "status")


# The ways back of docs/experiments.md.

SMOKE = ("-S", "scale=smoke", "-S", "variants=[milan]")  # in the clone what the default recipe is in the project
LINEAR = "reports/metrics/smoke/linear_eval/milan-0.json"


@pytest.fixture(scope="module")
def experiment(clone) -> tuple[bytes, bytes]:
    """Commit the results, run an experiment of one stage, and return dvc.lock: the committed one, the experiment's."""
    commit(clone)
    committed = lock(clone)
    dvc(clone, "exp", "run", *SMOKE, "-S", "linear_eval.epochs=2", "linear_eval")
    assert lock(clone) != committed
    return committed, lock(clone)


def test_a_run_put_aside_comes_back_after_the_committed_one(clone, experiment):
    """By the commands that `make repro` prints."""
    committed, own = experiment
    commands = dict(re.split(": +", line.replace(".venv/bin/", "")) for line in CHANGES.splitlines() if ":  " in line)
    (clone / "reports/untracked.txt").write_text("mine")
    metrics = (clone / LINEAR).read_bytes()
    run(["sh", "-c", commands["Put them aside"]], clone)
    assert lock(clone) == committed and run(["git", "status", "--porcelain"], clone) == ""
    dvc(clone, "checkout")
    assert "up to date" in dvc(clone, "status", "linear_eval@milan-0")
    run(["sh", "-c", commands["Bring them back"]], clone)
    assert lock(clone) == own and (clone / LINEAR).read_bytes() == metrics
    assert "up to date" in dvc(clone, "status", "linear_eval@milan-0")
    assert (clone / "reports/untracked.txt").read_text() == "mine"
    (clone / "reports/untracked.txt").unlink()


def test_the_default_recipe_comes_back_from_the_cache_after_an_experiment(clone, experiment):
    """Nothing is trained, also where a stopped stage left no results."""
    committed, _ = experiment
    victim = started(clone, "exp", "run", *SMOKE, "-S", "linear_eval.epochs=3", "linear_eval")
    # Not while DVC itself still works: the test below has what a kill of DVC leaves.
    wait_for(lambda: runs_module(victim, "stages.linear_eval"), victim)
    os.killpg(victim.pid, signal.SIGINT)
    victim.communicate()
    assert f" D {LINEAR}" in run(["git", "status", "--porcelain"], clone)
    said = dvc(clone, "exp", "run", *SMOKE, "linear_eval")
    assert "Stage 'linear_eval@milan-0' is cached" in said and STAGE_WORDS not in said
    assert lock(clone) == committed and run(["git", "status", "--porcelain"], clone) == ""


def test_what_dvc_leaves_when_it_is_killed_while_it_writes(clone):
    """As docs/reproducibility.md says, with the command that it gives."""
    (clone / ".dvc/tmp/rwlock").write_bytes(b"")
    dry = [*DVC, "repro", "--dry", "-s", "teacher"]
    assert "Unable to read RWLock-file" in run(dry, clone, check=False)
    run(["rm", ".dvc/tmp/rwlock"], clone)
    run(dry, clone)


def test_results_come_back_from_the_cache_where_the_committed_ones_never_were_here(clone):
    """As on another CPU: the teacher in the committed dvc.lock is a file that this cache does not have."""
    before = lock(clone)
    stages = yaml.safe_load(before)["stages"]
    (clone / "dvc.lock").write_bytes(before.replace(stages["teacher"]["outs"][0]["md5"].encode(), b"0" * 32 + b".dir"))
    assert "Running stage 'teacher'" in dvc(clone, "repro", "--dry", "-s", "teacher")  # which the next line spares
    (clone / "dvc.lock").unlink()
    said = dvc(clone, "repro", "linear_eval")
    assert "Stage 'teacher' is cached" in said and STAGE_WORDS not in said
    assert yaml.safe_load(lock(clone))["stages"].items() <= stages.items()
    (clone / "dvc.lock").write_bytes(before)
