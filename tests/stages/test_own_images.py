"""Own images, as docs/data.md takes them: from Fashion-MNIST's files to results under their own name, beside the demo's."""

import gzip
import io
import json
import re
import struct
import subprocess

import mlflow
import numpy as np
import yaml
from PIL import Image

from milan.data.records import Records
from milan.tracking.store import store_uri
from tests.conftest import ROOT
from tests.stages.test_pipeline import ENVIRONMENT, clone_of, dvc, run

GUIDE = (ROOT / "docs/data.md").read_text(encoding="utf-8")
NAMES = ["ankle boot", "bag", "coat", "dress", "pullover", "sandal", "shirt", "sneaker", "t-shirt", "trouser"]
IMAGES = {"train": 330, "t10k": 90}


def write_idx(folder, seed: int = 0) -> dict[str, np.ndarray]:
    """Write files of the package's form, every class as often, a stripe's place for its label. Return {files: images}."""
    written, generator = {}, np.random.default_rng(seed)
    folder.mkdir()
    for files, count in IMAGES.items():
        images = generator.integers(0, 60, (count, 28, 28), dtype=np.uint8)
        for number, image in enumerate(images):
            image[2 * (number % 10) : 2 * (number % 10) + 6] = 200
        labels = bytes(number % 10 for number in range(count))
        with gzip.open(folder / f"{files}-images-idx3-ubyte.gz", "wb") as file:
            file.write(struct.pack(">4i", 2051, count, 28, 28) + images.tobytes())
        with gzip.open(folder / f"{files}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(struct.pack(">2i", 2049, count) + labels)
        written[files] = images
    return written


def test_fashion_mnist_as_the_guide_takes_it(tmp_path, monkeypatch):
    """The guide's lines write the folders; its command, at smoke scale, leaves every result of the demo as it was."""
    written = write_idx(tmp_path / "idx")
    (lines,) = re.findall(r"^    (python - /usr.*?^    END)$", GUIDE, flags=re.M | re.S)
    script = re.sub("^    ", "", lines, flags=re.M).replace("/usr/share/datasets/fashion-mnist", str(tmp_path / "idx"))
    subprocess.run(["bash", "-ec", script.replace("/tmp/fashion", str(tmp_path / "fashion"))], env=ENVIRONMENT, check=True)
    assert sorted(path.name for path in (tmp_path / "fashion/test").iterdir()) == NAMES

    (command,) = re.findall(r"^    dvc (exp run -S scale=demo_teacher -S data.imagenet=/tmp/fashion)$", GUIDE, flags=re.M)
    words = command.replace("demo_teacher", "smoke").replace("/tmp/fashion", str(tmp_path / "fashion")).split()
    clone = clone_of(tmp_path / "milan")
    said = dvc(clone, *words, "-S", "variants=[milan]", "finetune")
    assert "fashion: test/ is read as val/." in said
    assert "These images are called fashion: results go to outs/fashion" in said

    records = Records(clone / "outs/fashion/imagenet", "val")
    assert records.classes == NAMES and len(records) == 90
    assert records[0]["name"] == "ankle boot/00009.png" and NAMES[records[0]["label"]] == "ankle boot"
    stored = np.asarray(Image.open(io.BytesIO(records[0]["image"])))
    assert (stored == written["t10k"][9]).all()
    made = {entry["path"] for stage in yaml.safe_load((clone / "dvc.lock").read_text())["stages"].values() for entry in stage["outs"]}
    assert made and all("/fashion/" in path for path in made)
    assert [path.name for path in (clone / "outs").iterdir() if path.is_dir()] == ["fashion"]
    assert run(["git", "status", "--porcelain", "reports/metrics/demo", "reports/curves/demo", "reports/table.md"], clone) == ""

    monkeypatch.chdir(clone)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    client = mlflow.MlflowClient(store_uri())
    version = client.get_model_version_by_alias("milan-fashion-classifier", "milan")
    top1 = json.loads((clone / "reports/metrics/fashion/finetune/milan-0.json").read_text())["finetune/top1"]
    assert (version.tags["data"], float(version.tags["top1"])) == ("fashion", top1)
    assert client.get_experiment_by_name("milan-fashion") and client.get_experiment_by_name("milan-demo") is None
