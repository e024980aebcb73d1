"""How far bfloat16 may be from float32, on a small model from the same weights, images and masks.

Compiled steps take longer to build than a test may: `python -m benchmarks.step --compile` prints their deviations."""

import pytest
import torch
from torch import nn

from milan.data import seeding
from milan.method import masking
from milan.method.model import MaskedPretraining
from milan.params import AblationRow, Model, TransformerSize
from milan.training.device import autocast, choose_attention

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
