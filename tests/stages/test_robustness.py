"""The stages of robustness on sets whose accuracies are known beforehand, and without any set."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from milan.core.validation import validate
from milan.data import records
from milan.evaluation.classifier import ClassifierInfo, build_classifier, save_classifier
from milan.evaluation.linear import LinearHead
from milan.method.encoder import Encoder
from milan.params import Params
from milan.training.weights import save_weights
from stages import prepare_robustness, robustness
from tests.conftest import change, run_main, write_split
from tests.layouts import WNIDS, class_tree, encoded

OWN = {"variant": "milan", "seed": 0, "weights": Path("weights"), "linear": Path("linear"), "classifier": Path("classifier")}


@pytest.fixture
def params(tree, workplace):
    """Return params(**paths of the sets) of a recipe that corrupts nothing; write records of three classes, an encoder, a classifier
    whose answer is class 2, or without it 1, and a linear layer whose answer is class 0, or without it 2."""
    tree["runtime"]["processes"], tree["compute"]["precision"] = 1, "fp32"
    change(tree, "prepare_robustness.images", 0)
    p = validate(Params, tree, "p")
    rows = [{"image": encoded(size=(64, 64), seed=i), "name": str(i), "label": i % 3} for i in range(6)]
    records.write_manifest(Path("records"), splits={"val": write_split(Path("records"), "val", rows, 10)}, classes=list("abc"), wnids=WNIDS)
    encoder = Encoder(p.model).vit.state_dict()
    save_weights(OWN["weights"] / "encoder.safetensors", encoder)
    vit, linear = build_classifier(p.model, p.finetune, 3, encoder), LinearHead(p.model.encoder.embed_dim, 3)
    with torch.no_grad():
        for layer, bias in ((vit.head, [0.0, 5.0, 9.0]), (linear.linear, [9.0, 0.0, 5.0])):
            layer.weight.zero_()
            layer.bias.copy_(torch.tensor(bias))
    save_classifier(OWN["classifier"], vit, ClassifierInfo(p.model, p.finetune.pooling, p.finetune.resize, list("abc")))
    save_weights(OWN["linear"] / "head.safetensors", linear.state_dict())

    def of(**paths: Path) -> Params:
        for name, path in paths.items():
            change(tree, f"data.robustness.{name}", str(path))
        return validate(Params, tree, "p")

    return of


def measured(params: Params) -> dict:
    packed = run_main(prepare_robustness, params, Path("sets"), Path("packed.json"), None, records=Path("records"))
    metrics = run_main(robustness, params, None, Path("metrics.json"), None, sets=Path("sets"), **OWN)
    return {"packed": {k: v for k, v in packed.items() if k != "recipe"}, **{k: v for k, v in metrics.items() if k != "recipe"}}


def test_each_set_is_scored_among_its_own_classes(params, workplace):
    """-A has classes 0 and 1: the classifier answers 1, which 3 of 4 images are, and the linear layer 0, which 1 is. V2 has all
    classes: 1 of 5 images is of class 2, and 2 are of class 0."""
    a = class_tree(workplace / "a", {f"{WNIDS[k > 0]}/{k}.jpg": encoded(size=(70, 60), seed=k) for k in range(4)})
    v2 = class_tree(workplace / "v2", {f"{label}/{k}.jpg": encoded(size=(50, 90), seed=k) for k, label in enumerate((0, 0, 1, 1, 2))})
    assert measured(params(imagenet_a=a, imagenet_v2=v2)) == {
        "packed": {"prepare_robustness/imagenet_a": 4, "prepare_robustness/imagenet_v2": 5},
        "robustness/finetune/imagenet_a_top1": 75.0,
        "robustness/linear/imagenet_a_top1": 25.0,
        "robustness/finetune/imagenet_v2_top1": 20.0,
        "robustness/linear/imagenet_v2_top1": 40.0,
    }


def test_images_of_imagenet_c_are_not_resized(params, tree, monkeypatch):
    """A black square in white: the corrupted image is seen whole; of the other, enlarged to twice its side, the black centre."""
    image, file, seen = np.full((48, 48, 3), 255, np.uint8), io.BytesIO(), []
    image[12:36, 12:36] = 0
    Image.fromarray(image).save(file, "PNG")
    row = {"image": file.getvalue(), "name": "a", "label": 0}
    splits = {name: write_split(Path("sets"), name, [row], 10) for name in ("imagenet_c-fog-1", "imagenet_sketch")}
    records.write_manifest(Path("sets"), splits=splits, classes=list("abc"))

    def look(images: torch.Tensor) -> torch.Tensor:
        seen.append(images[0, 0].unique(return_counts=True)[1].tolist())
        return torch.zeros(len(images), 3)

    monkeypatch.setattr(robustness, "load_heads", lambda *_: {"finetune": look})
    change(tree, "robustness.resize", 96)
    run_main(robustness, params(), None, Path("metrics.json"), None, sets=Path("sets"), **OWN)
    black_and_white, centre = seen
    assert black_and_white == [24 * 24, 48 * 48 - 24 * 24] and centre[0] > 0.9 * 48 * 48


def test_without_any_set_nothing_is_measured_and_the_stages_say_so(params, capsys):
    assert measured(params()) == {"packed": {}}
    said = capsys.readouterr().out
    assert "robustness is not measured" in said and "sets holds no set, so there is no robustness to measure" in said
