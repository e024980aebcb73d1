"""The fine-tuned classifier: from the finetune stage's spool into MLflow's registry, and served from there over HTTP."""

import base64
import contextlib
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import mlflow
import numpy as np
import pytest
import requests
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from milan.core.errors import UserError
from milan.evaluation.classifier import ClassifierInfo, save_classifier
from milan.params import Model, TransformerSize
from milan.serve.classify import ImageClassifier
from milan.tracking import logger, tracker
from milan.tracking.store import store_uri
from tests.tracking.test_tracker import write_spool

MODEL = Model("small", 16, 8, TransformerSize(16, 2, 2), TransformerSize(16, 1, 2))
CLASSES = ["ant", "bee", "cat", "dog", "emu", "fox"]
START = {"kind": "start", "name": "finetune milan seed 0", "experiment": "milan-test", "pipeline": "1-1", "recipe": {"scale": "test"}}
TAGS = {"stage": "finetune", "scale": "test", "git_revision": "abc", "variant": "milan", "seed": "0"}
OF_A_VERSION = {"data": "flowers", "top1": 41.25}


def small_vit(seed: int) -> VisionTransformer:
    """Build timm's ViT without the project's builder, with a head large enough to tell images apart."""
    torch.manual_seed(seed)
    vit = VisionTransformer(16, 8, embed_dim=16, depth=2, num_heads=2, num_classes=len(CLASSES), global_pool="avg").eval()
    torch.nn.init.normal_(vit.head.weight)
    return vit


def save_weights(folder: Path, seed: int) -> Path:
    vit = small_vit(seed)
    save_classifier(folder, vit, ClassifierInfo(MODEL, "mean", 20, CLASSES))
    return folder


def picture(kind: str = "JPEG", size: tuple[int, int] = (40, 28)) -> bytes:
    rng = np.random.default_rng(0)
    blocks = Image.fromarray(rng.integers(0, 255, (4, 5, 3), dtype=np.uint8))
    out = io.BytesIO()
    blocks.resize(size, Image.Resampling.BILINEAR).save(out, kind)
    return out.getvalue()


def expected_probabilities(data: bytes, seed: int) -> dict[str, float]:
    """Apply the evaluation transform (short side 20, central 16) and the forward pass with PIL and numpy."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    width, height = image.size
    image = image.resize((20 * width // height, 20), Image.Resampling.BICUBIC)
    left, top = round((image.width - 16) / 2), 2
    pixels = np.asarray(image.crop((left, top, left + 16, top + 16)), dtype=np.float32) / 255
    pixels = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    with torch.inference_mode():
        logits = small_vit(seed)(torch.from_numpy(pixels).float().permute(2, 0, 1)[None])
    return dict(zip(CLASSES, logits.softmax(dim=1)[0].tolist()))


def bomb(side: int) -> bytes:
    """Make a PNG of a few bytes whose header claims side x side pixels."""
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b""), b"IEND"]
    framed = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """Make a folder in which three finetune stages have ended: two results of milan, then the first one made again. A queued
    experiment, in a workspace of DVC's, has then made the second one again."""
    folder = tmp_path_factory.mktemp("serving #1? 100% a")  # characters that mean something in a URI
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        for place, seed in enumerate((0, 1, 0, 1), 1):
            if place == 4:
                logger.serve(None)
                workspace = folder / ".dvc/tmp/exps/tmp1"
                workspace.mkdir(parents=True)
                patch.chdir(workspace)
            spool = write_spool([{**START, "tags": TAGS}], place)
            out = save_weights(Path("outs") / str(seed), seed)
            tracker.Tracker(spool).classifier(out, "classifier-milan-0", "milan-test-classifier", "milan", OF_A_VERSION)
            tracker.Tracker(spool).event("end", status="FINISHED")
        logger.serve(None)
        yield folder


@pytest.fixture(scope="module")
def client(desk) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(store_uri())


@pytest.fixture(scope="module")
def server(desk):
    """Start `mlflow models serve` outside the project: the model brings its own code. Yields the address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = "-m mlflow models serve -m models:/milan-test-classifier@milan --env-manager local --host 127.0.0.1"
    environment = {**os.environ, "MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"}
    environment.pop("PYTHONPATH", None)
    with open(desk / "served.txt", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, *command.split(), "--port", str(port)],
            cwd=desk,
            env={**environment, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield wait_for(f"http://127.0.0.1:{port}", process, desk / "served.txt")
    finally:
        with contextlib.suppress(ProcessLookupError):  # the server never started
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def wait_for(address: str, process: subprocess.Popen, log: Path) -> str:
    for _ in range(1200):
        assert process.poll() is None, log.read_text()
        try:
            requests.get(f"{address}/ping", timeout=5).raise_for_status()
            return address
        except requests.RequestException:
            time.sleep(0.1)
    raise AssertionError(log.read_text())


def post(server: str, images: list, **more) -> requests.Response:
    rows = [[base64.b64encode(image).decode() if isinstance(image, bytes) else image] for image in images]
    return requests.post(
        f"{server}/invocations", json={"dataframe_split": {"columns": ["image"], "data": rows}, **more}, timeout=60
    )


def test_each_new_result_is_a_version_and_the_alias_is_on_the_last_one(desk, client):
    """A result that is made again adds no version, and a queued experiment leaves the alias where it is."""
    versions = {v.version: v for v in client.search_model_versions("name = 'milan-test-classifier'")}
    assert sorted(map(str, versions)) == ["1", "2"]
    (first,) = [v for v in versions.values() if str(v.version) == "1"]
    assert (first.tags["data"], first.tags["top1"]) == ("flowers", "41.25")
    assert (first.tags["variant"], first.tags["seed"], first.tags["git_revision"]) == ("milan", "0", "abc")
    assert first.tags["dvc"] == tracker.dvc_hash(desk / "outs/0")
    assert str(client.get_model_version_by_alias("milan-test-classifier", "milan").version) == "1"
    outputs = [client.get_run(run.info.run_id).outputs for run in client.search_runs(["1"], "tags.stage = 'finetune'")]
    assert sorted(f"models:/{made.model_outputs[0].model_id}" == first.source for made in outputs) == [False, False, True, True]


def test_the_store_has_the_weights_once_and_no_pickle(desk):
    stored = list((desk / "mlartifacts").rglob("*"))
    assert sum(path.suffix == ".safetensors" for path in stored) == 2, "one for each of two results"
    assert not [path for path in stored if path.suffix in (".pkl", ".pickle", ".pt", ".pth", ".bin")]


def test_the_model_names_no_folder_of_this_machine(desk):
    (about, _) = (desk / "mlartifacts").rglob("MLmodel")
    assert "code_path: " in about.read_text() and not re.search(r"[ '\"]/", about.read_text()), about.read_text()


def test_http_answers_equal_the_forward_pass(server):
    data = picture()
    answer = post(server, [data]).json()["predictions"]
    expected = expected_probabilities(data, seed=0)
    assert answer[0]["classes"] == sorted(CLASSES, key=expected.get, reverse=True)[:5]
    # 0.02: torchvision's bicubic differs from PIL's by a grey level or two.
    assert answer[0]["probabilities"] == pytest.approx([expected[name] for name in answer[0]["classes"]], abs=0.02)
    assert max(expected.values()) - min(expected.values()) > 0.1, "the image must tell the classes apart"


def test_a_request_with_two_images_and_all_classes(server):
    one, other = picture(), picture("PNG", (16, 50))
    both = post(server, [other, one], params={"top_k": 100}).json()["predictions"]
    alone = [post(server, [data], params={"top_k": 6}).json()["predictions"][0] for data in (other, one)]
    for together, single in zip(both, alone):
        assert together["classes"] == single["classes"] and set(single["classes"]) == set(CLASSES)
        assert together["probabilities"] == pytest.approx(single["probabilities"], abs=1e-5)
        assert sum(single["probabilities"]) == pytest.approx(1, abs=1e-5)
    assert both[0]["probabilities"] != pytest.approx(both[1]["probabilities"], abs=0.01)


@pytest.mark.parametrize("params", [{}, {"top_k": None}])
def test_without_a_number_of_classes_there_are_five(server, params):
    (answer,) = post(server, [picture()], params=params).json()["predictions"]
    assert len(answer["classes"]) == len(answer["probabilities"]) == 5 < len(CLASSES)


BAD_IMAGES = {
    "a text": (b"GIF89? No, a note.", "image 1 is no JPEG, PNG, WEBP or BMP file"),
    "an empty file": (b"", "image 1 is no JPEG, PNG, WEBP or BMP file"),
    "a truncated file": (picture(size=(200, 200))[:-100], "image 1 is damaged"),
    "a bomb": (bomb(100_000), "image 1 has more than 50,000,000 pixels"),
    "a smaller bomb": (bomb(10_000), "image 1 has more than 50,000,000 pixels"),
    "no base64": ("%%%", "image 1 is no JPEG"),
    "a number": (5, "Failed to convert column image"),
    "null": (None, "Failed to convert column image"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_image_is_named_with_status_400_and_the_server_goes_on(server, name):
    image, message = BAD_IMAGES[name]
    answer = post(server, [picture(), image])
    assert answer.status_code == 400 and answer.headers["content-type"] == "application/json"
    assert message in answer.json()["message"]
    assert post(server, [picture()]).ok


@pytest.mark.parametrize(
    "body, message",
    [
        ({"dataframe_split": {"columns": ["image"], "data": []}}, "There is no image"),
        ({"dataframe_split": {"columns": ["picture"], "data": [["aaaa"]]}}, "image"),
        ({"dataframe_split": {"columns": ["image"], "data": [["aaaa"]]}, "params": {"top_k": 0}}, "top_k must be 1 or more"),
        ({"images": []}, "dataframe_split"),
        ([], "Received a list"),
    ],
)
def test_a_bad_request_is_refused(server, body, message):
    answer = requests.post(f"{server}/invocations", json=body, timeout=60)
    assert answer.status_code == 400 and message in answer.json()["message"]


@pytest.mark.parametrize("body, status", [(b"\xff{", 400), (b"[" * 200_000, 500), (b'{"a":' * 200_000, 500)])
def test_a_body_that_is_no_json_is_refused_and_the_server_goes_on(server, body, status):
    answer = requests.post(f"{server}/invocations", data=body, headers={"content-type": "application/json"}, timeout=60)
    assert answer.status_code == status  # 500: MLflow's own, for what is nested too deep
    assert post(server, [picture()]).ok


# Without a server.


def test_encoded_bytes_are_classified_in_python(desk):
    classify = ImageClassifier(save_weights(desk / "plain", 1))
    data = picture()
    (answer,) = classify([data], 1)
    expected = expected_probabilities(data, seed=1)
    assert answer["classes"] == [max(CLASSES, key=expected.get)]
    assert answer["probabilities"] == pytest.approx([max(expected.values())], abs=0.02)


def test_an_image_of_the_largest_size_is_read_and_a_larger_one_is_not(desk, monkeypatch):
    classify = ImageClassifier(save_weights(desk / "plain", 1))
    monkeypatch.setattr("milan.serve.classify.MAX_PIXELS", 40 * 28)
    classify([picture()], 1)
    with pytest.raises(UserError, match="image 0 has more than 1,120 pixels"):
        classify([picture("PNG", (41, 28))], 1)


@pytest.mark.parametrize("size", [(1_000_000, 1), (1, 1_000_000)])
def test_a_line_of_a_million_pixels_is_classified_by_its_middle(desk, size):
    """4 KB, which would be resized to 1.2 GB (short side 20), and to 11.5 GB at 256."""
    classify = ImageClassifier(save_weights(desk / "plain", 1))
    line, square = np.zeros((*size[::-1], 3), np.uint8), np.full((20, 20, 3), (200, 100, 0), np.uint8)
    line.reshape(-1, 3)[499_980:500_020] = (200, 100, 0)
    outs = [io.BytesIO(), io.BytesIO()]
    for pixels, out in zip((line, square), outs):
        Image.fromarray(pixels).save(out, "PNG")
    began = time.monotonic()
    answers = classify([out.getvalue() for out in outs], 6)
    assert time.monotonic() - began < 10 and len(outs[0].getvalue()) < 10_000
    assert answers[0]["classes"] == answers[1]["classes"]
    assert answers[0]["probabilities"] == pytest.approx(answers[1]["probabilities"], abs=1e-5)


def test_weights_that_changed_before_delivery_are_not_registered(desk, client, capsys):
    """A later run has overwritten them: a version would hold other weights than the run made."""
    spool = write_spool([{**START, "tags": TAGS}], 4)
    tracker.Tracker(spool).classifier(save_weights(desk / "outs/2", 2), "classifier-milan-0", "milan-test-classifier", "milan", {})
    tracker.Tracker(spool).event("end", status="FINISHED")
    save_weights(desk / "outs/2", 3)
    logger.serve(None)
    assert "has changed since it was made: not registered" in capsys.readouterr().out
    assert len(client.search_model_versions("name = 'milan-test-classifier'")) == 2 and not spool.exists()


def test_a_classifier_that_does_not_fit_its_description_is_refused(tmp_path):
    folder = save_weights(tmp_path, 0)
    about = json.loads((folder / "classifier.json").read_text())
    (folder / "classifier.json").write_text(json.dumps({**about, "classes": CLASSES[:3]}))
    with pytest.raises(UserError, match="(?s)does not fit the model.*head"):
        ImageClassifier(folder)
    (folder / "classifier.json").write_text(json.dumps({**about, "pooling": "max"}))
    with pytest.raises(UserError, match=r"classifier\.json: pooling: 'max' is not one of mean, cls"):
        ImageClassifier(folder)
