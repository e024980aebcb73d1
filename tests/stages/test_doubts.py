"""Doubts: what a stage says where a number of its own means nothing, on its console and in its metrics."""

import json
from argparse import Namespace
from pathlib import Path
from unittest import mock

import pytest
import torch

from milan.core.identity import Identity
from milan.core.validation import validate
from milan.data.records import write_manifest
from milan.params import Params
from milan.stage import Stage
from stages import extract_targets, prepare_imagenet, pretrain, teacher
from tests.conftest import change, write_split
from tests.layouts import encoded


def write_records(val_labels: list[int]) -> None:
    """Write records of two classes whose validation images have these labels."""
    rows = [{"image": encoded(), "name": str(number), "label": label} for number, label in enumerate(val_labels)]
    write_manifest(Path("records"), splits={"val": write_split(Path("records"), "val", rows, 100)}, classes=["cat", "dog"])


@pytest.fixture
def stage(workplace, tree) -> Stage:
    given = Namespace(out=Path("records"), records=Path("records"), metrics=Path("metrics.json"))
    made = Stage("stage", given, validate(Params, tree, "params.yaml"))
    made.tracker = mock.Mock()
    return made


def test_a_doubt_is_printed_and_kept_with_the_metrics(stage, capsys):
    stage.doubt("It means nothing.")
    stage.doubt("Nor does this.")
    stage.write_metrics({"a/top1": 5.0}, Identity({}))
    assert capsys.readouterr().err == "warning: It means nothing.\nwarning: Nor does this.\n"
    assert json.loads(stage.args.metrics.read_text())["doubts"] == "It means nothing. Nor does this."


@pytest.mark.parametrize("labels, doubted", [([1, 1, 1], True), ([1, 0, 1], False)])
def test_a_validation_set_of_one_class(stage, labels, doubted):
    write_records(labels)
    prepare_imagenet.doubt_one_class(stage, ["cat", "dog"])
    assert any("All validation images are of one class, dog" in said for said in stage.doubts) == doubted
    prepare_imagenet.doubt_one_class(stage, [])  # images without labels
    assert len(stage.doubts) == doubted


@pytest.mark.parametrize("top1, doubted", [(59.0, True), (61.0, False)])
def test_a_teacher_at_chance(stage, top1, doubted):
    """Two classes, 100 images: 50 % and two standard errors of 5 %."""
    write_records([0, 1] * 50)
    teacher.doubt_chance(stage, top1)
    assert any(f"zero-shot accuracy, {top1:.1f} %, is that of guessing among 2 classes" in said for said in stage.doubts) == doubted


def test_the_loss_of_a_constant_answer_by_hand(stage):
    """Of two directions at right angles the best answer lies between them: 2 - 2 cos 45 degrees."""
    features = torch.tensor([[[3.0, 0], [0, 0.5]], [[1, 0], [0, 7]]]).half()
    assert extract_targets.constant_loss(features) == pytest.approx(2 - 2**0.5)
    extract_targets.doubt_features(stage, extract_targets.constant_loss(features))
    assert stage.doubts == []
    nearly = torch.tensor([[[1.0, 0.05], [1, -0.05]]])  # 2 - 2 / sqrt(1 + 0.05^2) = 0.0025
    extract_targets.doubt_features(stage, extract_targets.constant_loss(nearly))
    assert "a constant answer has a loss of 0.0025." in stage.doubts[0]


def test_a_loss_near_zero(stage):
    pretrain.doubt_loss(stage, 0.011)
    assert stage.doubts == []
    pretrain.doubt_loss(stage, 0.0034)
    assert "The loss is near zero, 0.0034" in stage.doubts[0]


@pytest.mark.parametrize("pairs, said", [(3, "as captions of 3 of the 5 training images (prepare_imagenet.pairs is 3)."), (5, "as captions.")])
def test_class_names_of_a_part_of_the_training_images(tree, tmp_path, capsys, pairs, said):
    """Three of five, evenly spread, are every second one: the first, the third and the fifth."""
    change(tree, "prepare_imagenet.pairs", pairs)
    images = Namespace(train=[{"image": None, "name": str(n), "label": 0} for n in range(5)], classes=["cat", "dog"])
    made = prepare_imagenet.captioned(tmp_path, images, validate(Params, tree, "params.yaml"))
    assert f"will learn from class names, {said}" in capsys.readouterr().out
    assert [pair["name"] for pair in made] == (["0", "2", "4"] if pairs == 3 else list("01234"))
