"""The plan's figures against formulas worked out by hand, and torch's own count on real models."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from milan import plan
from milan.core.errors import UserError
from milan.core.validation import validate
from milan.method.model import MaskedPretraining
from milan.params import Params, Pretrained, read_params
from milan.teacher.clip import build_tiny
from milan.teacher.towers import ClipTower
from tests.conftest import change


@pytest.fixture(scope="module")
def paper():
    return plan.composed("paper")


@pytest.fixture(scope="module")
def lines(paper) -> dict[str, plan.Line]:
    with FakeTensorMode(allow_non_fake_inputs=True):
        return {line.name: line for line in plan.lines(paper)}


def block(queries: int, keys: int, dim: int) -> float:
    """FLOPs of a transformer block whose keys and values are all computed here: 2 a multiply-add."""
    return 2 * (2 * queries * dim**2 + 2 * keys * dim**2 + 2 * queries * keys * dim + 8 * queries * dim**2)


def test_the_paper_s_arithmetic_by_hand(paper):
    """ViT-B/16 at 224: 196 patches, 49 visible; tokens with the class token."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        found = plan.parts(paper)
    embedding = 2 * 196 * 768 * 768
    teacher = embedding + 12 * block(197, 197, 768) + 2 * 197 * 768 * 512
    encoder = embedding + 12 * block(50, 50, 768)
    decoder = 2 * 50 * 768 * 512 + 8 * block(147, 197, 512) + 2 * 197 * 512 * 512
    assert found == {
        "teacher": pytest.approx(teacher, rel=0.02),
        "encoder": pytest.approx(encoder, rel=0.02),
        "decoder": pytest.approx(decoder, rel=0.02),
    }


@pytest.mark.parametrize("library, model, tokens, width, depth, patch, projection", [
    ("open_clip", "ViT-L-14-336", 577, 1024, 24, 14, 768),
    ("open_clip", "xlm-roberta-base-ViT-B-32", 50, 768, 12, 32, 512),
    ("timm", "vit_small_patch8_224", 785, 384, 12, 8, 0),
])  # fmt: skip
def test_any_released_teacher_is_counted_at_its_own_size(library, model, tokens, width, depth, patch, projection, paper):
    given = dataclasses.replace(paper.teacher, pretrained=Pretrained(library, model, "any", None, None))
    with FakeTensorMode(allow_non_fake_inputs=True):
        tower = plan.teacher(dataclasses.replace(paper, teacher=given))
        found = plan.flops_of(tower, plan.view_of(tower))
    expected = 2 * (tokens - 1) * 3 * patch**2 * width + depth * block(tokens, tokens, width) + 2 * tokens * width * projection
    assert found == pytest.approx(expected, rel=0.02) and tower.feature_dim == (projection or width)


def test_steps_and_hours_by_hand(lines):
    pretrain = lines["pretrain milan"]
    assert pretrain.steps == 400 * (1_281_167 // 4096) == 124_800
    assert pretrain.cost.step_flops == pretrain.cost.frozen_flops + 3 * pretrain.cost.trained_flops
    assert pretrain.flops == pytest.approx(124_800 * 4096 * 87.3e9, rel=0.01)
    assert (lines["segment"].steps, lines["finetune"].steps, lines["linear_eval"].steps) == (160_000, 125_100, 7_800)


def test_parameters_are_those_of_the_models(lines):
    """timm's ViT-B/16 has 85,798,656 without a head; pos_embed is not trained in pretraining, but in fine-tuning."""
    assert lines["finetune"].cost.parameters == 85_798_656 + 768 * 1000 + 1000
    encoder = 85_798_656 - 197 * 768
    decoder = 768 * 512 + 512 + 512 + 8 * (12 * 512**2 + 13 * 512) + 2 * 512 + 512 * 512 + 512
    assert lines["pretrain milan"].cost.parameters == encoder + decoder


def test_real_models_count_the_same():
    """The demo's models, made and run, under torch's counter; both towers of the teacher are its own."""
    p = read_params()
    with FakeTensorMode(allow_non_fake_inputs=True):
        found, pretrain = plan.parts(p), plan.pretrain_cost(p, "milan")
    images = torch.randn(1, 3, 48, 48)
    teacher = ClipTower(build_tiny(p.teacher.tiny, 48, 8, plan.TOKENS).visual)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        features, importance = teacher(images)
    assert found["teacher"] == counter.get_total_flops()
    model = MaskedPretraining(p.model, p.pretrain.ablation["milan"], 0.75, teacher.feature_dim)
    with FlopCounterMode(display=False) as counter:
        model(images, torch.randn(1, 36), features, importance)
    assert pretrain.trained_flops == counter.get_total_flops() == pytest.approx(found["encoder"] + found["decoder"])


def test_kept_activations_by_hand():
    """A linear layer keeps its input, a GELU its own; weights are not activations."""
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 2))
    flops, kept = plan.counted(lambda: model(torch.randn(5, 4)), list(model.parameters()))
    assert flops == 2 * 5 * (4 * 6 + 6 * 2)
    assert kept == 4 * 5 * (4 + 6 + 6)


def test_the_bank_s_and_the_saves_sizes(paper):
    with FakeTensorMode(allow_non_fake_inputs=True):
        found = plan.disk(paper)
    assert found["target bank"] == 0 and found["records"] == pytest.approx(146.9e9, rel=0.01)
    assert found["a save to resume from (two are kept)"] == 3 * found["weights, a variant and seed"]


@pytest.mark.parametrize("words, said", [
    (["--scale", "demo", "--tflops", "1"], "1 TFLOP/s a device (given)"),
    ([], "half of a matrix product's here"),
])  # fmt: skip
def test_the_command(words, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plan", *words])
    plan.main()
    printed = capsys.readouterr().out
    assert said in printed and "pretrain milan" in printed and "hours on 8" in printed and "disk: records" in printed


def test_a_recipe_that_pretrains_nothing_is_planned(tree):
    change(tree, "pretrain.ablation", {"scratch": {"target": "none", "decoder": "none", "masking": "none"}})
    tree["variants"] = ["scratch"]
    said = plan.plan(validate(Params, tree, "params.yaml"), 1e12, "given")
    assert "linear_eval" in said and "pretrain" not in said


def test_away_from_the_repository_it_says_where_to_run(workplace):
    with pytest.raises(UserError, match="run from the repository's root"):
        plan.composed("demo")


def test_a_broken_recipe_of_conf(workplace):
    Path("conf/scale").mkdir(parents=True)
    Path("conf/config.yaml").write_text("defaults: [{scale: mine}]")
    for text in ("scale: ${nothing}", "scale: [", "scale: 2024-13-45"):
        Path("conf/scale/mine.yaml").write_text(text)
        with pytest.raises(UserError, match="conf/scale/mine.yaml"):
            plan.composed("mine")


@pytest.mark.parametrize("words, said", [
    (["--scale", "papre"], "no scale 'papre'; conf/scale has demo, demo_gpu, paper"),
    *[(["--scale", name], f"no scale {name!r}; conf/scale has demo") for name in ("paper,demo", "a=b", "[", "${x}", "", "../config")],
    *[(["--tflops", number], "must be a number above 0") for number in ("0", "inf", "nan", "-1")],
    (["--params", "conf"], "conf cannot be read (Is a directory)"),
])  # fmt: skip
def test_a_mistake_is_said(words, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plan", *words])
    with pytest.raises(SystemExit):
        plan.main()
    assert said in " ".join(capsys.readouterr().err.split())
