"""Run scale=paper in miniature by DVC, from data in the layouts of the published archives to the table.

ViT-B/16 at 224 px, CLIP ViT-B/16 (random weights) from a local file in OpenAI's own format with its digest verified, data
loader workers, LARS, mixup, RandAugment, slide-window inference: every line that scale=paper executes in one process is run before
anyone waits days for it (several: tests/training/test_processes.py). Only the numbers of images, steps, student blocks, channels and
pixels of scenes are smaller.
"""

import hashlib
import json

import numpy as np
import open_clip
import pandas
import pytest
import timm
import torch
import yaml
from open_clip.model import CLIP
from safetensors.torch import load_file

from milan.data.records import Records
from tests import layouts
from tests.stages.test_pipeline import clone_of, dvc
from tests.teacher.test_released import INTEGERS, torchscript

KINDS = [("JPEG", "RGB"), ("JPEG", "CMYK"), ("JPEG", "L"), ("PNG", "RGB")]  # all of them named .JPEG


def changes(data, teacher) -> dict:
    """Return the changes to scale=paper: smaller numbers, and the paths of the files."""
    return {
        "scale": "paper",
        "data.imagenet": data / "imagenet",
        "data.ade20k": data / "ADEChallengeData2016.zip",
        "data.robustness.imagenet_r": data / "imagenet-r",
        "data.robustness.imagenet_v2": data / "imagenet-v2",
        "prepare_imagenet.expect": "null",
        "prepare_ade20k.expect": "null",
        "teacher.pretrained.file": teacher,
        "teacher.pretrained.sha256": hashlib.sha256(teacher.read_bytes()).hexdigest(),
        "extract_targets.figure_images": 4,
        "model.encoder.depth": 4,
        "model.decoder.depth": 1,
        "segment.out_blocks": "[0,1,2,3]",
        "compute.threads": 1,
        "compute.precision": "fp32",  # this machine may have no bf16
        "compute.compile": "false",  # minutes on a CPU
        "runtime.processes": 1,  # tests/training/test_processes.py has several
        "runtime.workers": 1,
        **sizes("pretrain", epochs=0.5, warmup=1 / 3, batch=4, micro=2),
        **sizes("linear_eval", epochs=2, warmup=1, batch=8, micro=4),
        **sizes("attentive_probe", epochs=1, warmup=0.5, batch=8, micro=4),
        **sizes("finetune", epochs=1 / 3, warmup=0.1, batch=4, micro=2),
        **sizes("segment", epochs=0.5, warmup=0.1, batch=2, micro=2),
        **sizes("dense_probe", epochs=1, warmup=0.5, batch=4, micro=2),
        **{f"{stage}.crop_size": 256 for stage in ("segment", "dense_probe")},
        **{f"{stage}.stride": 170 for stage in ("segment", "dense_probe")},
        **{f"{stage}.resize": "[1024,256]" for stage in ("segment", "dense_probe")},
        "segment.channels": 32,
        "segment.aux_channels": 16,
    }


def sizes(stage: str, epochs: float, warmup: float, batch: int, micro: int) -> dict:
    values = {"epochs": epochs, "warmup_epochs": warmup, "batch_size": batch, "micro_batch": micro}
    return {f"{stage}.{name}": value for name, value in values.items()}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Write ILSVRC2012's tars and devkit, with images of many sizes and unusual kinds, and ADE20K's zip of all 150 classes."""
    root, given = tmp_path_factory.mktemp("sets"), layouts.images()
    for split in given.values():
        for i, name in enumerate(split):
            kind, mode = KINDS[i % len(KINDS)]
            split[name] = layouts.encoded(kind, mode, size=(240 + 11 * i, 230 + 17 * i), seed=i)
    layouts.tars(root / "imagenet", given=given)
    shifted = layouts.encoded(size=(300, 260))
    layouts.class_tree(root / "imagenet-r", {f"{wnid}/a.jpg": shifted for wnid in layouts.WNIDS[1:]})
    layouts.class_tree(root / "imagenet-v2", {f"{label}/a.jpeg": shifted for label in range(3)})
    scenes = {}
    for split, n in {"training": 4, "validation": 2}.items():
        blocks = np.random.default_rng(n).integers(0, 151, (n, 7, 8)).repeat(40, axis=1).repeat(40, axis=2)
        for i in range(n):
            scenes[f"images/{split}/{i}.jpg"] = layouts.encoded(size=(320, 280), seed=i)
            scenes[f"annotations/{split}/{i}.png"] = layouts.annotation(blocks[i])
    layouts.zipped(root / "ADEChallengeData2016.zip", scenes)
    return root


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Write a CLIP ViT-B/16 in OpenAI's format: a TorchScript archive in half precision."""
    torch.manual_seed(0)
    config = open_clip.get_model_config("ViT-B-16-quickgelu")
    state = CLIP(**{name: config[name] for name in ("embed_dim", "quick_gelu", "vision_cfg", "text_cfg")}).state_dict()
    path = tmp_path_factory.mktemp("clip") / "ViT-B-16.pt"
    torch.jit.save(torchscript({**state, **INTEGERS}), path)
    return path


@pytest.mark.filterwarnings("ignore:.*jit.*")
def test_from_the_tars_to_the_table(data, teacher, tmp_path):
    clone = clone_of(tmp_path / "milan")
    options = [word for key, value in changes(data, teacher).items() for word in ("-S", f"{key}={value}")]
    said = dvc(clone, "exp", "run", *options, "report")  # and the stages that it needs: all but figures and page
    assert said.count("Running stage") == len(yaml.safe_load((clone / "dvc.lock").read_text())["stages"]) == 13
    metrics = {path.stem: json.loads(path.read_text()) for path in (clone / "reports/metrics/imagenet").rglob("*.json")}
    assert metrics["prepare_imagenet"] | {"recipe": 0} == {
        "prepare_imagenet/train": 12, "prepare_imagenet/val": 6, "prepare_imagenet/classes": 3, "recipe": 0,
    }  # fmt: skip
    assert "MILAN | ViT-B/16 | 0.5 | 4 |" in (clone / "reports/table.md").read_text()
    assert json.loads((clone / "outs/imagenet/teacher/class_text.json").read_text())["names"] == layouts.IMAGENET_NAMES
    linear = json.loads((clone / "reports/metrics/imagenet/linear_eval/milan-0.json").read_text())
    assert all(0 <= linear[f"linear_eval/zero_shot{seen}_top1"] <= 100 for seen in ("", "_masked"))
    robustness = json.loads((clone / "reports/metrics/imagenet/robustness/milan-0.json").read_text())
    # One picture with a class of each: of R's two classes one is right, of V2's three.
    assert robustness["robustness/finetune/imagenet_r_top1"] == 50 and robustness["robustness/linear/imagenet_v2_top1"] == 33.3333
    curve = pandas.read_csv(clone / "reports/curves/imagenet/pretrain/milan-0.csv")
    assert curve["lr"].tolist() == pytest.approx([0, 1.5e-4 * 4096 / 256])  # one step of warm-up, then the peak
    assert curve["loss"].min() > 0 and curve["loss"].max() < 4
    weights = clone / "outs/imagenet/pretrain/milan-0/encoder.safetensors"
    timm.create_model("vit_base_patch16_224", num_classes=0, depth=4).load_state_dict(load_file(weights))
    kept = Records(clone / "outs/imagenet/imagenet", "train")
    assert kept.manifest["wnids"] == layouts.WNIDS and kept.column("label") == [0] * 4 + [1] * 4 + [2] * 4
    classes = Records(clone / "outs/imagenet/ade20k", "val").manifest["classes"]
    assert len(classes) == 150
