"""How far bfloat16 may be from float32, on a small model from the same weights, images and masks, and which of them a CPU takes.

Compiled steps take longer to build than a test may: `python -m benchmarks.step --compile` prints their deviations."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from milan.core.validation import validate
from milan.data import seeding
from milan.method import masking
from milan.method.model import MaskedPretraining
from milan.params import AblationRow, Model, Params, TransformerSize
from milan.tracking.tracker import Tracker
from milan.training import device
from milan.training.device import autocast, choose_attention, resolve_params

MODEL = Model("small", 48, 8, TransformerSize(96, 4, 4), TransformerSize(64, 3, 4))
RECIPES = {
    "milan": AblationRow(target="clip", decoder="prompt", masking="semantic"),
    "mae": AblationRow(target="pixels", decoder="mae", masking="random"),
}
CPU = torch.device("cpu")


def pretrain_once(recipe: AblationRow, precision: str) -> dict[str, torch.Tensor]:
    """Predictions, loss and every gradient of the first step."""
    choose_attention(precision, CPU)
    seeding.seed_globals(0, "precision")
    model = MaskedPretraining(MODEL, recipe, 0.75, 48)
    images, noise = torch.randn(6, 3, 48, 48), torch.randn(6, MODEL.n_patches)
    features, importance = torch.randn(6, 1 + MODEL.n_patches, 48), torch.rand(6, MODEL.n_patches)
    visible = masking.sample_visible(noise, model.n_visible)
    with autocast(precision, CPU):
        predictions = model.predict(images, visible, masking.complement(visible, MODEL.n_patches))
        loss = model(images, noise, features, importance)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "predictions": predictions.detach().float(), **gradients}


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()


@pytest.fixture(params=RECIPES)
def both(request) -> tuple[dict, dict]:
    yield pretrain_once(RECIPES[request.param], "bf16"), pretrain_once(RECIPES[request.param], "fp32")
    choose_attention("fp32", CPU)


def test_bf16_predictions_and_loss_are_near_float32_s(both):
    found, exact = both
    assert 0 < relative(found["predictions"], exact["predictions"]) < 0.02
    assert relative(found["loss"], exact["loss"]) < 1e-3


def test_bf16_gradients_are_near_float32_s(both):
    """Each one's direction, and the norm of all: what clipping and AdamW see."""
    found, exact = ({name: value for name, value in one.items() if name not in ("loss", "predictions")} for one in both)
    assert found.keys() == exact.keys() and all(gradient.dtype == torch.float32 for gradient in found.values())
    norms = [nn.utils.get_total_norm(list(one.values())).item() for one in (found, exact)]
    assert norms[0] == pytest.approx(norms[1], rel=0.003)
    for name, gradient in exact.items():
        assert nn.functional.cosine_similarity(found[name].flatten(), gradient.flatten(), dim=0) > 0.999, name


@pytest.mark.parametrize("fp32, bf16, expected", [(0.004, 0.001, "bf16"), (0.002, 0.003, "fp32")])
def test_auto_takes_the_faster_precision_of_this_cpu_once(fp32, bf16, expected, tree, monkeypatch, workplace, capsys):
    """By a clock that passes fp32 and bf16 seconds in a block of that precision."""
    readings = itertools.accumulate(itertools.cycle([0, fp32, 0, bf16]))
    monkeypatch.setattr(device, "time", SimpleNamespace(perf_counter=lambda: next(readings)))
    tree["compute"] |= {"device": "cpu", "precision": "auto"}
    params, tracker = validate(Params, tree, "params.yaml"), Tracker(Path("spool"))
    assert resolve_params(params, tracker).compute.precision == expected
    assert f"precision: {expected}" in (said := capsys.readouterr().out)
    assert f"{1000 * fp32:g} ms in fp32 and {1000 * bf16:g} ms in bf16" in said
    assert json.loads(tracker.spool.read_text())["values"] == {"device": "cpu", "precision": expected}
    monkeypatch.setattr(device, "time", None)  # a second stage looks at no clock
    assert resolve_params(params).compute.precision == expected and capsys.readouterr().out == said


@pytest.mark.parametrize("given", ["fp32", "bf16", "fp16"])
def test_a_precision_that_is_given_is_not_measured(given, tree, workplace):
    tree["compute"]["precision"] = given
    params = validate(Params, tree, "params.yaml")
    assert resolve_params(params) == params and not device.MEASURED.exists()
