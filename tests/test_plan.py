"""The plan's numbers against formulas worked out by hand and against torch's counts on real models."""

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
from milan.params import Params, Pretrained
from milan.teacher.clip import build_tiny
from milan.teacher.towers import ClipTower
from tests.conftest import change


@pytest.fixture(scope="module")
def paper():
    return plan.compose_recipe("paper")


@pytest.fixture(scope="module")
def stages(paper) -> dict[str, plan.StagePlan]:
    with FakeTensorMode(allow_non_fake_inputs=True):
        return {stage.name: stage for stage in plan.stage_plans(paper)}


def block(queries: int, keys: int, dim: int) -> float:
    """Return FLOPs of a transformer block that computes keys and values for all tokens; a multiply-add counts as 2."""
    return 2 * (2 * queries * dim**2 + 2 * keys * dim**2 + 2 * queries * keys * dim + 8 * queries * dim**2)


def test_the_paper_s_arithmetic_by_hand(paper):
    """ViT-B/16 at 224: 196 patches, 49 visible; tokens with the class token."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        flops = plan.component_flops(paper)
    embedding = 2 * 196 * 768 * 768
    teacher = embedding + 12 * block(197, 197, 768) + 2 * 197 * 768 * 512
    encoder = embedding + 12 * block(50, 50, 768)
    decoder = 2 * 50 * 768 * 512 + 8 * block(147, 197, 512) + 2 * 197 * 512 * 512
    assert flops == {
        "teacher": pytest.approx(teacher, rel=0.02),
        "encoder": pytest.approx(encoder, rel=0.02),
        "decoder": pytest.approx(decoder, rel=0.02),
    }


@pytest.mark.parametrize("library, model, tokens, width, depth, patch, projection", [
    ("open_clip", "ViT-L-14-336", 577, 1024, 24, 14, 768),
    ("open_clip", "xlm-roberta-base-ViT-B-32", 50, 768, 12, 32, 512),
    ("timm", "vit_small_patch8_224", 785, 384, 12, 8, 0),
])  # fmt: skip
def test_a_released_teacher_is_counted_at_its_own_image_size(library, model, tokens, width, depth, patch, projection, paper):
    given = dataclasses.replace(paper.teacher, pretrained=Pretrained(library, model, "any", None, None))
    with FakeTensorMode(allow_non_fake_inputs=True):
        tower = plan.fake_teacher(dataclasses.replace(paper, teacher=given))
        flops = plan.forward_flops(tower, plan.fake_images(1, tower.size))
    expected = 2 * (tokens - 1) * 3 * patch**2 * width + depth * block(tokens, tokens, width) + 2 * tokens * width * projection
    assert flops == pytest.approx(expected, rel=0.02) and tower.feature_dim == (projection or width)


def test_steps_and_hours_by_hand(stages):
    pretrain = stages["pretrain milan"]
    assert pretrain.steps == 400 * (1_281_167 // 4096) == 124_800
    assert pretrain.cost.step_flops == pretrain.cost.frozen_flops + 3 * pretrain.cost.trained_flops
    assert pretrain.flops == pytest.approx(124_800 * 4096 * 87.3e9, rel=0.01)
    assert (stages["segment"].steps, stages["finetune"].steps, stages["linear_eval"].steps) == (160_000, 125_100, 7_800)
    assert stages["dense_probe"].steps == 40_000
    assert stages["attentive_probe"].steps == 20 * (1_281_167 // 1024) == 25_020
    # A LayerNorm, the query and its projection, keys and values, an output projection, a LayerNorm, an MLP of 4 widths, the layer.
    layers = 768**2 + 768 + 2 * (768**2 + 768) + 768**2 + 768 + 8 * 768**2 + 5 * 768 + 768 * 1000 + 1000
    assert stages["attentive_probe"].cost.parameters == 2 * 768 + 768 + layers + 2 * 768
    assert stages["attentive_probe"].cost.frozen_flops == stages["linear_eval"].cost.frozen_flops
    # 197 keys and values of one query, and what follows it.
    attended = 2 * 197 * 2 * 768**2 + 2 * 2 * 197 * 768
    assert stages["attentive_probe"].cost.trained_flops == attended + 2 * (2 + 8) * 768**2 + 2 * 768 * 1000
    # Frozen: the embedding of 1,024 patches of 768 values and 12 blocks of 1,025 tokens. Trained: 768 x 150 a patch.
    assert stages["dense_probe"].cost.frozen_flops == pytest.approx(2 * 1024 * 768**2 + 12 * block(1025, 1025, 768), rel=0.01)
    assert stages["dense_probe"].cost.trained_flops == 2 * 1024 * 768 * 150
    assert stages["dense_probe"].cost.parameters == 2 * 768 + 768 * 150 + 150


def test_robustness_is_planned_where_sets_are_given(paper, stages):
    """Two forward passes of ViT-B/16 (17.6 GMAC, 35.1 GFLOP) for each of 7,500 images of -A and 19 x 5 x 50,000 of -C."""
    assert "robustness" not in stages
    sets = dataclasses.replace(paper.data.robustness, imagenet_a="/a", imagenet_c="/c")
    given = dataclasses.replace(paper, data=dataclasses.replace(paper.data, robustness=sets))
    with FakeTensorMode(allow_non_fake_inputs=True):
        planned = {stage.name: stage for stage in plan.stage_plans(given)}["robustness"]
    assert planned.images == 4_757_500 and planned.steps == 4_757_500 // 256
    assert planned.flops == pytest.approx(4_757_500 * 2 * 35.1e9, rel=0.01)


def test_parameters_are_those_of_the_models(stages):
    """timm's ViT-B/16 has 85,798,656 without a head; pos_embed is trained in fine-tuning and not in pretraining."""
    assert stages["finetune"].cost.parameters == 85_798_656 + 768 * 1000 + 1000
    encoder = 85_798_656 - 197 * 768
    decoder = 768 * 512 + 512 + 512 + 8 * (12 * 512**2 + 13 * 512) + 2 * 512 + 512 * 512 + 512
    assert stages["pretrain milan"].cost.parameters == encoder + decoder


def test_real_models_count_the_same(tree):
    """Build and run the demo's real models under torch's counter."""
    params = validate(Params, tree, "params.yaml")
    with FakeTensorMode(allow_non_fake_inputs=True):
        flops, pretrain = plan.component_flops(params), plan.pretrain_cost(params, "milan")
    images = torch.randn(1, 3, 48, 48)
    teacher = ClipTower(build_tiny(params.teacher.tiny, 48, 8, plan.VOCABULARY).visual)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        features, importance = teacher(images)
    assert flops["teacher"] == counter.get_total_flops()
    model = MaskedPretraining(params.model, params.pretrain.ablation["milan"], 0.75, teacher.feature_dim)
    with FlopCounterMode(display=False) as counter:
        model(images, torch.randn(1, 36), features, importance)
    assert pretrain.trained_flops == counter.get_total_flops() == pytest.approx(flops["encoder"] + flops["decoder"])


def test_kept_activations_by_hand():
    """Linear layers and the GELU keep their inputs; weights are not counted."""
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 2))
    flops, kept = plan.count_pass(lambda: model(torch.randn(5, 4)), list(model.parameters()))
    assert flops == 2 * 5 * (4 * 6 + 6 * 2)
    assert kept == 4 * 5 * (4 + 6 + 6)


def test_disk_bytes_of_bank_records_and_saves(paper):
    with FakeTensorMode(allow_non_fake_inputs=True):
        sizes = plan.disk_bytes(paper)
    assert sizes["target bank"] == 0 and sizes["records"] == pytest.approx(146.9e9, rel=0.01)
    assert sizes["a save to resume from (two are kept)"] == 3 * sizes["weights, a variant and seed"]


@pytest.mark.parametrize("words, line", [
    (["--scale", "demo", "--tflops", "1"], "1 TFLOP/s a device (given)"),
    ([], "half of a matrix product's here"),
])  # fmt: skip
def test_the_command(words, line, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plan", *words])
    plan.main()
    printed = capsys.readouterr().out
    assert line in printed and "pretrain milan" in printed and "hours on 8" in printed and "disk: records" in printed


def test_a_recipe_that_pretrains_nothing_is_planned(tree):
    change(tree, "pretrain.ablation", {"scratch": {"target": "none", "decoder": "none", "masking": "none"}})
    tree["variants"] = ["scratch"]
    text = plan.format_plan(validate(Params, tree, "params.yaml"), 1e12, "given")
    assert "linear_eval" in text and "pretrain" not in text


def test_outside_the_repository_the_error_says_where_to_run(workplace):
    with pytest.raises(UserError, match="run from the repository's root"):
        plan.compose_recipe("demo")


def test_a_broken_recipe_in_conf_is_named(workplace):
    Path("conf/scale").mkdir(parents=True)
    Path("conf/config.yaml").write_text("defaults: [{scale: mine}]")
    for text in ("scale: ${nothing}", "scale: [", "scale: 2024-13-45"):
        Path("conf/scale/mine.yaml").write_text(text)
        with pytest.raises(UserError, match="conf/scale/mine.yaml"):
            plan.compose_recipe("mine")


@pytest.mark.parametrize("words, message", [
    (["--scale", "papre"], "no scale 'papre'; conf/scale has demo, demo_gpu, demo_teacher, paper"),
    *[(["--scale", name], f"no scale {name!r}; conf/scale has demo") for name in ("paper,demo", "a=b", "[", "${x}", "", "../config")],
    *[(["--tflops", number], "must be a number above 0") for number in ("0", "inf", "nan", "-1")],
    (["--params", "conf"], "conf cannot be read (Is a directory)"),
])  # fmt: skip
def test_a_wrong_argument_is_explained(words, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plan", *words])
    with pytest.raises(SystemExit):
        plan.main()
    assert message in " ".join(capsys.readouterr().err.split())
