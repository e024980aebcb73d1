"""The target bank's stage: a teacher from which nothing can be learned is named, and no bank is written."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from milan.core.errors import UserError
from milan.core.validation import validate
from milan.params import Params
from milan.teacher.clip import build_tiny
from milan.teacher.towers import ClipTower
from stages import extract_targets, prepare_imagenet
from tests.conftest import change, run_main

NAN, SAME = "gives features that are NaN", "gives the same features for 4 different images"


def constant(visual: nn.Module) -> None:
    visual.ln_post.weight.zero_()
    visual.ln_post.bias.fill_(1)


def blind(visual: nn.Module) -> None:
    """Let the image through nowhere; positions still differ."""
    visual.conv1.weight.zero_()


TEACHERS: dict[str, tuple[Callable[[nn.Module], None], str]] = {
    "zero": (lambda visual: visual.proj.zero_(), SAME),
    "below float16": (lambda visual: visual.proj.mul_(1e-9), SAME),
    "constant": (constant, SAME),
    "blind": (blind, SAME),
    "NaN": (lambda visual: visual.proj[0].fill_(float("nan")), NAN),
    "infinite": (lambda visual: visual.proj[0].fill_(float("inf")), NAN),
    "above float16": (lambda visual: visual.proj.mul_(1e6), NAN),
}


@pytest.fixture
def params(tree, workplace, monkeypatch) -> Params:
    changes = {"train": 20, "val": 20, "pairs": 20}
    tree["prepare_imagenet"] |= changes
    tree["extract_targets"] |= {"figure_images": 4, "views": 1}
    tree["teacher"]["tiny"]["conv_stem"] = False
    for name in ("teacher", "pretrain", "linear_eval", "attentive_probe", "finetune"):
        tree[name] |= {"batch_size": 4, "micro_batch": 4}
    change(tree, "finetune.labels", 1.0)
    change(tree, "runtime.processes", 1)
    params = validate(Params, tree, "params.yaml")
    run_main(prepare_imagenet, params, Path("records"), Path("m.json"), Path("c.csv"))
    Path("clip").mkdir()
    Path("clip/teacher.safetensors").touch()
    return params


def extract(params: Params, monkeypatch, harm: Callable[[nn.Module], None]) -> dict:
    """Extract the targets of a teacher to which harm was done."""
    torch.manual_seed(0)
    visual = build_tiny(params.teacher.tiny, params.model.image_size, params.model.patch_size, 40).visual
    with torch.no_grad():
        harm(visual)
    tower = ClipTower(visual).eval().requires_grad_(False)
    monkeypatch.setattr(extract_targets, "load_tower", lambda *_: tower)
    return run_main(extract_targets, params, Path("bank"), Path("b.json"), Path("c.csv"), records=Path("records"), teacher=Path("clip"))


def test_a_teacher_without_use_is_named_and_leaves_no_bank(params, monkeypatch):
    for case, (harm, said) in TEACHERS.items():
        with pytest.raises(UserError) as error:
            extract(params, monkeypatch, harm)
        assert f"The teacher in clip (trained here) {said}" in str(error.value), case
        assert not Path("bank").exists() and not Path("b.json").exists()
    assert extract(params, monkeypatch, lambda visual: None)["extract_targets/figure_images"] == 4


@pytest.mark.parametrize("importance", [float("nan"), float("inf"), 0.0])
def test_an_importance_without_use_is_named(tree, monkeypatch, importance):
    targets = (torch.randn(2, 5, 3), torch.full((2, 4), importance))
    monkeypatch.setattr(extract_targets, "compute_targets", lambda *_: targets)
    checked = extract_targets.checked_targets(validate(Params, tree, "p"), None, Path("clip"), torch.device("cpu"))
    with pytest.raises(UserError, match="The teacher in clip .* gives an importance that is NaN or infinite, or zero"):
        checked(torch.zeros(2, 3, 8, 8))


def test_constant_features_are_told_from_different_ones():
    same = torch.randn(1, 5, 3).expand(4, 5, 3).clone()
    assert extract_targets.is_constant(same) and extract_targets.is_constant(torch.zeros(4, 5, 3))
    same[2, 1, 0] += 0.1 * same.abs().max()
    assert not extract_targets.is_constant(same)
    assert extract_targets.is_constant(torch.ones(1, 5, 3)) and not extract_targets.is_constant(torch.randn(1, 5, 3))
