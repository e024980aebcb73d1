"""The benchmarks run, and what they compare is the same computation."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as everything
from benchmarks import (
    bank,
    causes,
    cost,
    cpu,
    growth,
    kernels,
    loader,
    measure,
    parts,
    plain,
    scaling,
    startup,
    step,
    tasks,
    teacher,
)
from milan.method import masking
from milan.method.model import MaskedPretraining
from milan.params import Model, TransformerSize
from tests.conftest import ROOT

SMALL = Model("small", 32, 8, TransformerSize(24, 2, 3), TransformerSize(16, 2, 2))
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


SCRIPTS = {
    step: (["--model", "tiny", "--batch", "2", "--precisions", "fp32"], 3),
    loader: (["--images", "4", "--width", "64", "--height", "48", "--workers", "1", "--batch", "2"], 5),
    teacher: (["--model", "tiny", "--batch", "2"], 2),
    cost: (["--model", "tiny", "--batches", "2", "--sizes", "64"], 2),
    kernels: (["--model", "tiny", "--batch", "2", "--task", "UPerNet"], 6),
    bank: (["--model", "tiny", "--images", "4", "--batch", "2"], 3),
    tasks: (["--model", "tiny", "--batch", "2", "--scenes", "2"], 3),
    parts: (["--model", "tiny", "--batch", "2", "--precision", "fp32"], 8),
    causes: (["--model", "tiny", "--batch", "2", "--precision", "bf16"], 4),
    cpu: (["--model", "tiny", "--batch", "1", "--channels", "8"], 20),
    startup: (["--stages", "prepare_imagenet"], 3),
    growth: (["--only", "records", "bank", "report", "--images", "64", "128", "--seeds", "1", "2"], 12),
    scaling: (["--model", "tiny", "--batch", "2", "--steps", "1", "--processes", "1", "2"], 2),
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_a_benchmark_prints_a_table_and_writes_json(script, monkeypatch, tmp_path, capsys, workplace):
    path, (arguments, rows) = tmp_path / "figures.json", SCRIPTS[script]
    common = ["--device", "cpu", "--repeats", "1", "--threads", "1", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", [script.__name__, *arguments, *common])
    script.main()
    found = json.loads(path.read_text())
    printed = capsys.readouterr().out
    assert all(f"| {row['case']} " in printed for row in found["rows"]) and len(found["rows"]) >= rows
    assert all(row.get("images/s", row.get("ms a step", row.get("processor s", row.get("largest size")))) > 0 for row in found["rows"])
    assert found["about"]["torch"] == torch.__version__


def test_they_need_neither_dvc_nor_mlflow():
    """Nor what only the pipeline needs; with those shut out, every script still imports."""
    names = ", ".join(script.__name__ for script in SCRIPTS)
    shut = "import sys; sys.modules.update(dict.fromkeys(['dvc', 'mlflow', 'pandas', 'matplotlib', 'nbclient']))"
    done = subprocess.run([sys.executable, "-c", f"{shut}; import {names}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_all_runs_each_in_turn_and_says_which_failed(monkeypatch, tmp_path, capsys):
    ran = []

    def run(command: list[str], limit: float) -> str | None:
        ran.append(command)
        return "ended with status 1" if "benchmarks.tasks" in command else None

    monkeypatch.setattr(everything, "run", run)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--quick", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="failed: tasks"):
        everything.main()
    assert {command[2] for command in ran} == {script.__name__ for script in SCRIPTS}
    assert [Path(command[-1]).stem for command in ran] == list(everything.FULL) == list(everything.QUICK)
    assert f"{len(ran) - 1} of {len(ran)} benchmarks" in capsys.readouterr().out and (tmp_path / "out").is_dir()


def test_a_benchmark_over_its_limit_is_stopped_with_what_it_started(monkeypatch, tmp_path):
    trace = tmp_path / "alive"
    child = f"import time; time.sleep(3); open({str(trace)!r}, 'w')"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert everything.run([sys.executable, "-c", "0"], 4) == "no time was left"
    monkeypatch.setattr(everything, "LEAST", 0)
    assert everything.run([sys.executable, "-c", parent], 1) == "stopped after 1 s"
    time.sleep(3)
    assert not trace.exists()
    assert everything.run([sys.executable, "-c", "raise SystemExit(3)"], 60) == "ended with status 3"


def test_deviations_of_the_teacher_by_hand():
    """One image, four patches: ranks 0 1 2 3 against 1 0 2 3, and a tenth of the importance moved."""
    exact = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]), torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    found = torch.tensor([[[2.0, 0.0], [1.0, 1.0]]]), torch.tensor([[0.2, 0.1, 0.3, 0.4]])
    values = teacher.deviations(found, exact)
    assert values["cosine"] == pytest.approx((1 + 0.5**0.5) / 2) and values["lowest cosine"] == pytest.approx(0.5**0.5)
    assert values["total variation"] == pytest.approx(0.1)
    assert values["rank correlation"] == pytest.approx(1 - 6 * 2 / (4 * 15))  # Spearman: 1 - 6 sum d^2 / (n (n^2 - 1))
    assert teacher.deviations(exact, exact)["% same visible"] == 100


def test_kernels_are_sorted_into_kinds():
    names = {
        "aten::addmm": "matrix products",
        "nvjet_hsh_128x256_64x4": "matrix products",
        "autograd::engine::evaluate_function: AddmmBackward0": "bookkeeping",
        "aten::t": "bookkeeping",
        "pytorch_flash::flash_fwd_kernel": "attention",
        "aten::_fused_adamw_": "optimizer",
        "void at::native::multi_tensor_apply_kernel": "optimizer",
        "aten::native_layer_norm": "norms and softmax",
        "triton_per_fused_add_native_layer_norm_7": "norms and sums, compiled",
        "Memcpy DtoD (Device -> Device)": "copies",
        "triton_poi_fused_gelu_3": "elementwise, compiled",
        "aten::mkldnn_convolution": "convolution",
    }
    assert {name: kernels.kind_of(name) for name in names} == names
    rows = kernels.rows_of([("aten::mm", 0.3, 6), ("aten::addmm", 0.1, 2), ("aten::gelu", 0.1, 4), ("aten::t", 0.0, 9)], 2)
    assert [(row["case"], row["%"], row["calls"]) for row in rows] == [("matrix products", pytest.approx(80), 4), ("elementwise", pytest.approx(20), 2)]
    assert rows[0]["ms a step"] == pytest.approx(200) and rows[0]["longest"] == "aten::mm"


def test_products_by_shape_by_hand():
    """Two calls of 2 x 3 x 5: 120 operations in 1 ns are 0.12 TFLOP/s."""
    events = [("aten::addmm", [[5], [2, 3], [3, 5]], 1e-9, 2), ("aten::bmm", [[4, 2, 3], [4, 3, 5]], 1e-9, 1), ("aten::add", [[2]], 1.0, 1)]
    rows = kernels.shapes_of(events, 1, 0.24)
    assert [row["m x k x n"] for row in rows] == ["2 x 3 x 5", "4 x 2 x 3 x 5"]
    assert rows[0]["TFLOP/s"] == pytest.approx(0.12) and rows[0]["lost ms"] == pytest.approx(5e-7)
    assert rows[1]["TFLOP/s"] == pytest.approx(0.24) and rows[1]["lost ms"] == pytest.approx(0)


def test_medians_and_spread_by_hand():
    assert measure.median([3.0, 1.0, 2.0]) == 2 and measure.spread([3.0, 1.0, 2.0]) == 50
    assert [measure.form(value) for value in (0.12345, None, "x", 7)] == ["0.123", "", "x", "7"]


def test_cases_take_turns():
    said = []
    seconds = measure.in_turn({name: lambda name=name: said.append(name) for name in "ab"}, 2, torch.device("cpu"), warm=1)
    assert said == ["a", "b"] * 3 and [len(values) for values in seconds.values()] == [2, 2]


def test_growth_by_hand():
    """Ten times the size: ten times the cost is linear, a hundred times quadratic."""
    assert growth.exponent([10, 100], [2.0, 20.0]) == pytest.approx(1)
    assert growth.exponent([10, 100], [2.0, 200.0]) == pytest.approx(2)
    assert growth.exponent([10, 100], [2.0, 2.0]) == 0
    assert growth.exponent([10], [2.0]) is None and growth.exponent([10, 100], [0.0, 1.0]) is None
