"""pretrain.weights: the evaluations run on exactly the weights of a released MILAN checkpoint, without any teacher."""

import pytest
import torch
from safetensors.torch import load_file

from milan.core.errors import UserError
from milan.core.files import read_checked
from milan.core.validation import validate
from milan.method.model import MaskedPretraining
from milan.params import AblationRow, Model, Params
from milan.teacher.clip import load_teacher
from stages import attentive_probe, extract_targets, linear_eval, prepare_imagenet, pretrain, teacher
from tests.conftest import change, run_main
from tests.stages.test_dvc import entry

SETTINGS = {
    "runtime.processes": 1,
    "compute.threads": 1,
    "compute.precision": "fp32",
    "variants": ["milan"],
    "prepare_imagenet.train": 40,
    "prepare_imagenet.val": 20,
    "prepare_imagenet.pairs": 20,
    "linear_eval.epochs": 2,
    "linear_eval.batch_size": 20,
    "linear_eval.micro_batch": 20,
    "linear_eval.views": 1,
    "attentive_probe.epochs": 2,
    "attentive_probe.batch_size": 20,
    "attentive_probe.micro_batch": 20,
    "attentive_probe.views": 1,
    "finetune.labels": 1.0,
    "finetune.batch_size": 20,
    "finetune.micro_batch": 20,
    "pretrain.batch_size": 20,
    "pretrain.micro_batch": 20,
    "teacher.batch_size": 20,
    "teacher.micro_batch": 20,
    "teacher.tiny": None,
    "teacher.pretrained": {
        "library": "open_clip",
        "model": "ViT-B-16-quickgelu",
        "tag": "openai",
        "file": "absent.pt",
        "sha256": None,
    },
    "pretrain.weights": "milan.pth",
}


@pytest.fixture
def recipe(tree, workplace):
    def params(**others) -> Params:
        for place, value in {**SETTINGS, **others}.items():
            change(tree, place, value)
        return validate(Params, tree, "params.yaml")

    return params


def released(model: Model, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return encoder and decoder under official names, with random values."""
    tensors = MaskedPretraining(model, AblationRow("clip", "prompt", "semantic"), 0.75, 20).state_dict()
    generator = torch.Generator().manual_seed(seed)
    names = {name.removeprefix("encoder.vit.").removeprefix("decoder."): tensor.shape for name, tensor in tensors.items()}
    return {name: torch.randn(shape, generator=generator) for name, shape in names.items()}


def run(module, p: Params, folder, **arguments) -> dict:
    name = module.__name__.split(".")[-1]
    return run_main(module, p, folder / name, folder / f"{name}.json", folder / f"{name}.csv", **arguments)


def up_to_pretrain(p: Params, folder) -> dict:
    records = folder / "prepare_imagenet"
    if not records.exists():
        run(prepare_imagenet, p, folder)
    run(teacher, p, folder, records=records)
    run(extract_targets, p, folder, records=records, teacher=folder / "teacher")
    given = {"teacher": folder / "teacher", "bank": folder / "extract_targets"}
    return run(pretrain, p, folder, variant="milan", seed=0, records=records, **given)


def test_a_released_checkpoint_is_evaluated_without_any_teacher(recipe, workplace, capsys):
    p = recipe()
    state = released(p.model)
    torch.save({"model": state}, "milan.pth")
    first = up_to_pretrain(p, workplace)

    assert capsys.readouterr().out.count("pretrain.weights is set: no teacher is needed") == 2
    assert {path.name for path in (workplace / "teacher").iterdir()} == {"teacher.json"}
    assert read_checked(workplace / "teacher/teacher.json") == {"kind": "none"}
    assert {path.name for path in (workplace / "extract_targets").iterdir()} == {"bank.json"}
    bank = read_checked(workplace / "extract_targets/bank.json")
    assert (bank["views"], bank["feature_dim"]) == (0, 0)
    with pytest.raises(UserError, match=r"holds no teacher: pretrain\.weights was set"):
        load_teacher(workplace / "teacher")

    written = load_file(workplace / "pretrain/encoder.safetensors")
    assert written.keys() == {name for name in state if not name.startswith(("decoder_", "mask_token"))}
    assert all(tensor.dtype == state[name].dtype and tensor.equal(state[name]) for name, tensor in written.items())
    assert not (workplace / "pretrain/decoder.safetensors").exists()

    given = {"records": workplace / "prepare_imagenet", "weights": workplace / "pretrain", "teacher": workplace / "teacher"}
    metrics = run(linear_eval, p, workplace, variant="milan", seed=0, **given)
    assert 0 <= metrics["linear_eval/top1"] <= 100 and not any("zero_shot" in name for name in metrics)

    few = recipe(**{"linear_eval.labels": 0.5})
    metrics = run(linear_eval, few, workplace / "few", variant="milan", seed=0, **given)
    assert 0 <= metrics["linear_eval/knn_top1"] <= 100
    listed = (workplace / "few/linear_eval/labels.csv").read_text().splitlines()
    assert len(listed) == 1 + 20  # of 40 images
    del given["teacher"]
    metrics = run(attentive_probe, p, workplace, variant="milan", seed=0, **given)
    assert 0 <= metrics["attentive_probe/top1"] <= 100

    recipe(**{"linear_eval.labels": 1.0})
    torch.save({"model": released(p.model, seed=1)}, "milan.pth")
    assert up_to_pretrain(p, workplace)["recipe"] != first["recipe"]


def test_a_checkpoint_that_is_absent_or_of_another_size_is_refused(recipe, workplace):
    p = recipe()
    with pytest.raises(UserError, match=r"milan\.pth is no file"):
        up_to_pretrain(p, workplace)
    small = recipe(**{"model.encoder.embed_dim": 64, "model.encoder.depth": 4})
    torch.save({"model": released(small.model)}, "milan.pth")
    with pytest.raises(UserError, match=r"misshapen: cls_token is \[1, 1, 64\], not \[1, 1, 128\]"):
        up_to_pretrain(p, workplace)
    broken = released(p.model)
    broken["blocks.0.attn.qkv.bias"][3] = float("nan")
    torch.save({"model": broken}, "milan.pth")
    with pytest.raises(UserError, match=r"milan\.pth: blocks\.0\.attn\.qkv\.bias holds values that are no finite numbers"):
        up_to_pretrain(p, workplace)


def test_without_released_weights_the_teacher_is_built(recipe, workplace, tree):
    tiny = dict(tree["teacher"]["tiny"])
    p = recipe(**{"pretrain.weights": None})
    assert not p.no_teacher
    run(prepare_imagenet, p, workplace)
    with pytest.raises(UserError, match=r"absent\.pt is no file"):
        run(teacher, p, workplace, records=workplace / "prepare_imagenet")
    assert not recipe(**{"teacher.tiny": tiny, "teacher.pretrained": None}).no_teacher


@pytest.mark.parametrize("stage", ["teacher", "extract_targets", "pretrain"])
def test_dvc_tracks_the_params_that_decide_whether_there_is_a_teacher(stage):
    listed = set(entry(stage)["params"])
    assert listed & {"pretrain.weights", "pretrain"}
    assert listed & {"teacher.pretrained", "teacher"}
