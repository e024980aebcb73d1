"""The benchmarks run, and what they compare is the same computation."""

import json
import sys

import pytest
import torch

from benchmarks import loader, measure, plain, step
from milan import masking
from milan.model import MaskedPretraining
from milan.params import Model, Tower

SMALL = Model("small", 32, 8, Tower(24, 2, 3), Tower(16, 2, 2))
FEATURES = 12


def plain_weights(ours: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our weights under the plain rendering's names."""
    names = {"encoder.vit.": "encoder.", "decoder.decoder_": "", "decoder.mask": "mask", "patch_embed.proj": "patches"}
    names |= {"cls_token": "cls", "pos_embed": "positions", ".attn.": ".attention.", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2", "pred.": "predict."}
    found = {}
    for name, value in ours.items():
        for old, new in names.items():
            name = name.replace(old, new)
        if ".qkv." in name:
            found[name.replace("qkv", "q")], found[name.replace("qkv", "kv")] = value.split([len(value) // 3, 2 * len(value) // 3])
        else:
            found[name] = value
    return found


def test_plain_and_ours_are_one_algorithm():
    """The same weights, images and masks give the same loss and the same gradient."""
    torch.manual_seed(0)
    ours, other = MaskedPretraining(SMALL, step.MILAN, 0.75, FEATURES), plain.Milan(SMALL, FEATURES)
    other.load_state_dict(plain_weights(ours.state_dict()))
    images, noise = torch.randn(3, 3, 32, 32), torch.randn(3, 16)
    features, importance = torch.randn(3, 17, FEATURES), torch.rand(3, 16)
    visible = masking.sample_visible(noise, 4, importance)
    order = torch.cat([visible, masking.complement(visible, 16)], dim=1)
    losses = ours(images, noise, features, importance), other.loss(images, features, order)
    torch.testing.assert_close(*losses, atol=1e-6, rtol=1e-5)
    for loss in losses:
        loss.backward()
    theirs = {name: parameter.grad for name, parameter in other.named_parameters()}
    for name, grad in plain_weights({n: p.grad for n, p in ours.named_parameters() if p.grad is not None}).items():
        torch.testing.assert_close(grad, theirs[name], atol=1e-6, rtol=1e-4, msg=name)
    assert 0 < other(images, features, importance).item() < 4


@pytest.mark.parametrize("script, arguments", [
    (step, ["--model", "tiny", "--batch", "2", "--precisions", "fp32"]),
    (loader, ["--images", "4", "--width", "64", "--height", "48"]),
])  # fmt: skip
def test_a_benchmark_prints_a_table_and_writes_json(script, arguments, monkeypatch, tmp_path, capsys, one_thread):
    path = tmp_path / "figures.json"
    monkeypatch.setattr(sys, "argv", [script.__name__, *arguments, "--device", "cpu", "--repeats", "2", "--threads", "1", "--json", str(path)])
    script.main()
    found = json.loads(path.read_text())
    printed = capsys.readouterr().out
    assert all(f"| {row['case']} " in printed for row in found["rows"]) and len(found["rows"]) == 3
    assert all(row["images/s"] > 0 for row in found["rows"]) and found["about"]["torch"] == torch.__version__


def test_medians_and_spread_by_hand():
    assert measure.median([3.0, 1.0, 2.0]) == 2 and measure.spread([3.0, 1.0, 2.0]) == 50
    assert [measure.form(value) for value in (0.12345, None, "x", 7)] == ["0.123", "", "x", "7"]


def test_cases_take_turns():
    said = []
    seconds = measure.in_turn({name: lambda name=name: said.append(name) for name in "ab"}, 2, torch.device("cpu"), warm=1)
    assert said == ["a", "b"] * 3 and [len(values) for values in seconds.values()] == [2, 2]
