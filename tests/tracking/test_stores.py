"""Test docs/stores.md on local servers: DVC's remote on S3-compatible storage, and MLflow's server with a database and
artifacts on the same storage."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest

from milan.tracking import tracker
from tests.conftest import ROOT
from tests.tracking.test_tracker import start_logger

pytest.importorskip("moto", reason="the S3 server of these tests, moto[s3] of requirements.txt, is not installed")
boto3 = pytest.importorskip("boto3", reason="boto3, which dvc[s3] of requirements.txt brings, is not installed")

SECRET = "sesame-0pen"
KEYS = {"AWS_ACCESS_KEY_ID": "milan", "AWS_SECRET_ACCESS_KEY": SECRET}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextlib.contextmanager
def serving(port: int, *command: str, **environment: str) -> Iterator[str]:
    """Run a local server in its own processes while the block lasts. Yields its address."""
    address, words = f"http://127.0.0.1:{port}", [sys.executable, "-m", *command]
    with open(f"{command[0]}.log", "wb") as log:
        server = subprocess.Popen(words, env={**os.environ, **environment}, stdout=log, stderr=log, start_new_session=True)
    try:
        while not answers(address):
            assert server.poll() is None, Path(f"{command[0]}.log").read_text()
            time.sleep(0.1)
        yield address
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # also the workers that it has started
        server.wait()


def answers(address: str) -> bool:
    try:
        urllib.request.urlopen(address, timeout=60).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Iterator[Path]:
    """Set up an empty folder as home and working folder, without stores or keys in the environment."""
    folder = tmp_path_factory.mktemp("stores")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in [name for name in os.environ if name.startswith(("AWS_", "MLFLOW_", "DVC_"))]:
            patch.delenv(name)
        for name in ("GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL"):
            patch.setenv(name, "milan")
        patch.setenv("HOME", str(folder))
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("PYTHONPATH", str(ROOT))
        yield folder


@pytest.fixture(scope="module")
def s3(desk) -> Iterator[str]:
    """Run an S3 server with an empty bucket, milan. Yields its address."""
    port = free_port()
    with serving(port, "moto.server", "-H", "127.0.0.1", "-p", str(port)) as address:
        client(address).create_bucket(Bucket="milan")
        yield address


def client(address: str):
    keys = {"aws_access_key_id": "milan", "aws_secret_access_key": SECRET}
    return boto3.client("s3", endpoint_url=address, region_name="us-east-1", **keys)


def stored(address: str, prefix: str) -> dict[str, bytes]:
    """Return the objects of the bucket under a prefix: {rest of the name: content}."""
    bucket = client(address)
    items = bucket.list_objects_v2(Bucket="milan", Prefix=prefix).get("Contents", [])
    names = [item["Key"] for item in items]
    return {name.removeprefix(prefix): bucket.get_object(Bucket="milan", Key=name)["Body"].read() for name in names}


# DVC: push from one clone, pull in another.

PIPELINE = """
stages:
  prepare_imagenet:
    cmd: mkdir -p outs/demo/imagenet && echo records > outs/demo/imagenet/train && echo 20 > outs/demo/imagenet/manifest.json
    outs: [outs/demo/imagenet]
"""


def run(folder: str, *words: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(words, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, timeout=100)


def dvc(folder: str, *words: str, **environment: str) -> str:
    done = run(folder, sys.executable, "-m", "dvc", *words, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def commit(folder: str) -> None:
    for words in ("add -A", "commit -qm all"):
        assert run(folder, "git", *words.split()).returncode == 0


@pytest.fixture(scope="module")
def project(s3) -> str:
    """Make a project with this one's DVC configuration and one stage that has run; its remote is the bucket."""
    shutil.copytree(ROOT / ".dvc", "project/.dvc", ignore=lambda folder, names: {*names} - {"config", ".gitignore"})
    shutil.copy(ROOT / ".gitignore", "project")
    Path("project/dvc.yaml").write_text(PIPELINE)
    run("project", "git", "init", "-q")
    dvc("project", "repro")
    dvc("project", "remote", "add", "-d", "store", "s3://milan/dvc")
    dvc("project", "remote", "modify", "store", "endpointurl", s3)
    dvc("project", "remote", "modify", "store", "region", "us-east-1")
    commit("project")
    return "project"


def test_one_clone_pulls_the_data_that_another_pushed(project, s3):
    refused = run(project, sys.executable, "-m", "dvc", "push")
    assert refused.returncode != 0 and "Unable to locate credentials" in refused.stderr

    dvc(project, "remote", "modify", "--local", "store", "access_key_id", "milan")
    dvc(project, "remote", "modify", "--local", "store", "secret_access_key", SECRET)
    dvc(project, "push")
    train, manifest = (hashlib.md5(text).hexdigest() for text in (b"records\n", b"20\n"))
    listing = [{"md5": manifest, "relpath": "manifest.json"}, {"md5": train, "relpath": "train"}]
    folder = json.dumps(listing).encode()
    expected = {train: b"records\n", manifest: b"20\n", hashlib.md5(folder).hexdigest() + ".dir": folder}
    assert stored(s3, "dvc/files/md5/") == {f"{name[:2]}/{name[2:]}": data for name, data in expected.items()}

    assert run(".", "git", "clone", "-q", project, "clone").returncode == 0
    assert not Path("clone/outs").exists()
    dvc("clone", "pull", **KEYS)
    assert Path("clone/outs/demo/imagenet/train").read_text() == "records\n"
    assert "up to date" in dvc("clone", "status")


def test_keys_stay_out_of_git(project):
    dvc(project, "remote", "modify", "--local", "store", "secret_access_key", SECRET)
    assert SECRET in Path(project, ".dvc/config.local").read_text()
    assert run(project, "git", "status", "--porcelain", "-uall").stdout == ""


# MLflow: a stage while the server is down, and one while it is up.


@pytest.fixture(scope="module")
def tracked(desk, s3) -> Iterator[mlflow.MlflowClient]:
    """Yield a client of a server that has both stages' runs; the stages have its address and a password, but no S3 key."""
    port = free_port()
    command = f"mlflow server --backend-store-uri sqlite:///{desk}/server.db --artifacts-destination s3://milan/mlflow"
    command = [*command.split(), "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    environment = {**KEYS, "MLFLOW_S3_ENDPOINT_URL": s3, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracker, "DELIVERY_TIMEOUT", 500)  # the machine may be busy
        patch.setenv("MLFLOW_TRACKING_URI", f"http://milan:{SECRET}@127.0.0.1:{port}")
        run_stage("early")
        assert sorted(path.suffix for path in tracker.SPOOLS.glob("*-*")) == [".failed", ".jsonl"]
        with serving(port, *command, **environment) as address:
            run_stage("late")
            yield mlflow.MlflowClient(address)


def run_stage(name: str) -> None:
    """Act as a stage that trains and evaluates."""
    logger = start_logger(name)
    for step, loss in ((1, 0.5), (2, 0.25)):
        logger.tracker.point({"step": step, "loss": loss})
    weights = Path(f"weights-{name}")
    weights.mkdir()
    (weights / "encoder").write_text(f"weights of {name}")
    logger.tracker.model(weights, f"milan-{name}")
    logger.tracker.evaluates(weights)
    logger.tracker.results({"linear_eval/top1": 34.5})
    logger.finish("FINISHED", wait=True)


@pytest.mark.parametrize("name", ["early", "late"])
def test_the_server_has_all_events_of_a_stage(tracked, s3, name):
    experiment = tracked.get_experiment_by_name("milan-test").experiment_id
    (run,) = tracked.search_runs([experiment], f"attributes.run_name = '{name}'")
    assert (run.info.status, run.data.tags["stage"]) == ("FINISHED", name)
    assert run.data.params == {"pretrain.lr": "0.5", "seeds": "[0, 1]"}
    curve = tracked.get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in curve] == [(1, 0.5), (2, 0.25)]

    (model,) = tracked.search_logged_models([experiment], f"name = 'milan-{name}'")
    assert (model.source_run_id, str(model.status)) == (run.info.run_id, "READY")
    assert {metric.key: metric.value for metric in model.metrics} == {"linear_eval/top1": 34.5}

    inside = f"weights/weights-{name}/encoder"
    assert Path(tracked.download_artifacts(run.info.run_id, inside)).read_text() == f"weights of {name}"
    kept = stored(s3, f"mlflow/{experiment}/{run.info.run_id}/artifacts/")
    assert kept == {inside: f"weights of {name}".encode()}


def test_no_spool_is_left_and_the_password_is_in_no_file(tracked, desk):
    """The files of database, servers and loggers are searched; DVC's own file of keys is not."""
    assert [path.name for path in tracker.SPOOLS.glob("*-*")] == []
    assert tracked.tracking_uri in tracker.LOG.read_text(), "the loggers must name the server"
    written = [path for path in desk.rglob("*") if path.is_file() and path.name != "config.local"]
    assert desk / "server.db" in written
    assert [path for path in written if SECRET.encode() in path.read_bytes()] == []
