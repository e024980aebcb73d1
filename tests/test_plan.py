"""The plan's numbers against formulas worked out by hand and against torch's counts on real models."""

import dataclasses
import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from milan import plan
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
    with plan.FAKE:
        return {stage.name: stage for stage in plan.stage_plans(paper)}


def block(queries: int, keys: int, dim: int) -> float:
    """Return FLOPs of a transformer block that computes keys and values for all tokens; a multiply-add counts as 2."""
    return 2 * (2 * queries * dim**2 + 2 * keys * dim**2 + 2 * queries * keys * dim + 8 * queries * dim**2)


def test_the_paper_s_arithmetic_by_hand(paper):
    """ViT-B/16 at 224: 196 patches, 49 visible; tokens with the class token."""
    with plan.FAKE:
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
    with plan.FAKE:
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
    with plan.FAKE:
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
    with plan.FAKE:
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
    with plan.FAKE:
        sizes = plan.disk_bytes(paper)
    assert sizes["target bank"] == 0 and sizes["records"] == pytest.approx(146.9e9, rel=0.01)
    assert sizes["a save to resume from (two are kept)"] == 3 * sizes["weights, a variant and seed"]


def a_plan(name: str, **more) -> plan.StagePlan:
    """1,000 images in two epochs of batches of 100, 1 + 3 x 3 = 10 GFLOP each; three runs."""
    return plan.StagePlan(name, 1000, 2, 100, 100, plan.Cost(0, 1e9, 3e9, 0), 3, pixels=100_000, **more)


def test_hours_by_hand():
    """Of arithmetic, loading and calls of kernels the slowest counts; start and evaluation come on top."""
    device = plan.Device("", 100e12, plan.Shares(pretrain=0.1, finetune=0.2, segment=0.5, frozen=0.4))
    arithmetic = 2000 * 10e9 / 10e12
    assert a_plan("pretrain milan").seconds(device, workers=100) == pytest.approx(3 * (2 + arithmetic))
    assert a_plan("pretrain milan").seconds(device, workers=100, devices=4) == pytest.approx(3 * (2 + arithmetic / 4))
    loading = 2000 * (0.8e-3 + 100_000 * 8.3e-9)
    assert a_plan("pretrain milan").seconds(device, workers=1) == pytest.approx(3 * (2 + loading))
    tested = a_plan("finetune", tests=500).seconds(device, workers=0)
    assert tested == pytest.approx(3 * (2 + 2000 * 10e9 / 20e12 + 500 * 4e9 / 20e12))
    once = a_plan("linear_eval", loads=1000).seconds(device, workers=1)
    assert once == pytest.approx(3 * (2 + 1000 * (0.8e-3 + 100_000 * 8.3e-9) + 20 * 0.0028))
    kernels = dataclasses.replace(device, peak=1e18)
    windows = a_plan("segment", windows=300)
    assert windows.seconds(kernels, workers=0) == pytest.approx(3 * (2 + 20 * 0.028 + 300 * 0.028 / 3))
    assert windows.seconds(dataclasses.replace(kernels, gpu=False), workers=0) == pytest.approx(6, abs=0.01)


@pytest.mark.parametrize("name, compiled, peak, pretrain", [
    ("H200", True, 989e12, 0.34), ("NVIDIA H100 80GB HBM3", False, 989e12, 0.22), ("a100", False, 312e12, 0.22),
    ("RTX 4090", True, 165e12, 0.34), ("CPU", False, 0.1e12, 0.33),
])  # fmt: skip
def test_cards_are_known_by_name(name, compiled, peak, pretrain, paper):
    params = dataclasses.replace(paper, compute=dataclasses.replace(paper.compute, compile=compiled, threads=1))
    device = plan.device_named(name, params)
    assert (device.peak, device.rate("pretrain")) == (peak, pytest.approx(peak * pretrain))
    assert device.rate("teacher") == device.rate("linear_eval") == device.peak * device.shares.frozen


def test_the_plan_of_what_was_measured():
    """demo_gpu on an H100 with two loader workers a stage took these seconds (reports/evidence/demo_gpu/seeds/stages.csv, means
    of six that shared the GPU), and the demo on two cores of an EPYC those."""
    gpu, cpu = plan.compose_recipe("demo_gpu"), plan.compose_recipe("demo")
    with plan.FAKE:
        on_gpu, on_cpu = ({stage.name: stage for stage in plan.stage_plans(params)} for params in (gpu, cpu))
    for name, measured in {"pretrain milan": 97.5, "pretrain mae": 98.2, "finetune": 33.6, "linear_eval": 17.4}.items():
        stage = on_gpu[name]
        assert stage.seconds(plan.device_named("H100", gpu), workers=2) / stage.runs == pytest.approx(measured, rel=0.3), name
    for name, measured in {"pretrain mae": 90.4, "pretrain milan": 84.9, "finetune": 11.4, "linear_eval": 10.8, "segment": 14.7}.items():
        stage = on_cpu[name]
        assert stage.seconds(plan.device_named("CPU", cpu), workers=0, devices=2) / stage.runs == pytest.approx(measured, rel=0.35), name


def test_windows_of_scenes_by_hand(paper):
    """Scenes of 48 x 64 pixels, crops of 48 with a stride of 32: two windows; at half the scale one, padded to the crop."""
    section = dataclasses.replace(paper.segment, crop_size=48, stride=32, resize=[192, 48], scales=[0.5, 1.0], flip=True)
    assert plan.scene_windows(paper, section) == paper.prepare_ade20k.val * (1 + 2) * 2


@pytest.mark.parametrize("words, line", [
    (["--scale", "demo", "--tflops", "1"], "if a device sustains 1 TFLOP/s"),
    ([], "on a CPU, 1 core(s) a process"),
])  # fmt: skip
def test_the_command(words, line, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plan", *words])
    plan.main()
    printed = capsys.readouterr().out
    assert line in printed and "pretrain milan" in printed and "hours on 8" in printed and "disk: records" in printed


def test_a_recipe_that_pretrains_nothing_is_planned(tree, paper):
    change(tree, "pretrain.ablation", {"scratch": {"target": "none", "decoder": "none", "masking": "none"}})
    tree["variants"] = ["scratch"]
    text = plan.format_plan(validate(Params, tree, "params.yaml"), plan.device_named("A100", paper))
    assert "linear_eval" in text and "pretrain" not in text


@pytest.mark.parametrize("words, message", [
    (["--scale", "papre"], "no scale 'papre'; conf/scale has demo, demo_gpu, demo_teacher, paper"),
    *[(["--scale", name], f"no scale {name!r}; conf/scale has demo") for name in ("paper,demo", "a=b", "[", "${x}", "", "../config")],
    (["--card", "abacus"], "No figures are known for 'abacus', only for A100, H100, H200, 4090, CPU"),
    *[(["--tflops", number], "must be a number above 0") for number in ("0", "inf", "nan", "-1")],
    (["--params", "conf"], "conf cannot be read (Is a directory)"),
])  # fmt: skip
def test_a_wrong_argument_is_explained(words, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plan", *words])
    with pytest.raises(SystemExit):
        plan.main()
    assert message in " ".join(capsys.readouterr().err.split())
