"""The golden command: the stored numbers of the original pass, a changed number or a changed method misses, and seeds
and sizes that are not stored pass against a plain rendering of the method (tests/plain.py)."""

import functools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from milan.method import decoder, masking
from milan.training import optim
from tests import golden, plain

STORED = Path(__file__).parent / "golden"


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = golden.main([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


@pytest.mark.timeout(600)
def test_stored_numbers_of_the_original(capsys):
    status, out, _ = run(capsys, STORED)
    assert status == 0, out
    compared = {line.split()[1] for line in out.splitlines() if line.startswith("PASS")}
    manifest = json.loads((STORED / "manifest.json").read_text())
    assert compared == {*manifest["cases"], *manifest["json_files"]}


@pytest.fixture
def copied(tmp_path):
    """A folder with some of the stored cases and files."""

    def copy(cases=(), files=()) -> Path:
        manifest = json.loads((STORED / "manifest.json").read_text())
        manifest["cases"] = {name: manifest["cases"][name] for name in cases}
        manifest["json_files"] = {name: "" for name in files}
        for name in (*files, *(entry["file"] for entry in manifest["cases"].values())):
            shutil.copy(STORED / name, tmp_path)
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        return tmp_path

    return copy


def change_array(folder: Path, case: str, tensor: str, by: float) -> None:
    with np.load(folder / f"{case}.npz") as stored:
        arrays = dict(stored)
    arrays[tensor].reshape(-1)[3] += by
    np.savez(folder / f"{case}.npz", **arrays)


@pytest.mark.parametrize(
    ("case", "array", "by", "named"),
    [
        ("A_milan_tiny", "latent", 1e-3, "latent"),
        ("A_milan_tiny", "pred__slice", 1e-4, "pred[:, :, ::6]"),
        ("A_milan_tiny", "grad_norms", 1e-5, "grad_norms (relative)"),
        ("A_milan_tiny", "keep_prob_mc", 0.02, "keep_prob_mc"),
        ("H2_trajectory_fixed_batch", "final_param_norms", 0.1, "final_param_norms (relative)"),
        ("G_schedule", "lr_pretrain", 1e-6, "lr_pretrain"),
        ("D1_clip_tiny", "importance", float("nan"), "importance"),
    ],
)
def test_a_changed_number_misses_and_is_named(copied, capsys, case, array, by, named):
    folder = copied([case])
    change_array(folder, case, array, by)
    status, out, _ = run(capsys, folder)
    assert status == 1
    assert out.splitlines()[-1] == f"missed: {case} {named}"
    assert [line.split()[0] for line in out.splitlines() if f"  {named} " in line] == ["MISS"]


def test_changed_statistics_miss(copied, capsys):
    folder = copied(["A_milan_tiny"])
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["cases"]["A_milan_tiny"]["tensors"]["pred"]["stats"]["mean"] += 1e-3
    (folder / "manifest.json").write_text(json.dumps(manifest))
    status, out, _ = run(capsys, folder)
    assert status == 1
    assert out.splitlines()[-1] == "missed: A_milan_tiny pred mean, std, l2"


@pytest.mark.parametrize(
    ("file", "path", "value", "named"),
    [
        ("E_finetune_groups.json", ("params", "pos_embed", "weight_decay"), 0.05, "scale and decay of every parameter"),
        ("G_pretrain_weight_decay.json", ("models", "milan_tiny", "frozen"), ["pos_embed"], "milan_tiny: frozen"),
        ("J_augmentation.json", ("pretrain", "blr"), 1e-4, "pretrain.blr"),
        ("J_augmentation.json", ("transforms", "pretrain", 0, "args", "scale"), [0.1, 1.0], "pretrain[0] RandomResizedCrop"),
        ("J_augmentation.json", ("finetune", "new_fact"), 3, "finetune.new_fact"),
        ("K_mapping.json", ("neck", 3, "official"), "decoder_norm.gain", "neck -> official"),
    ],
)
def test_a_changed_fact_misses_and_is_named(copied, capsys, file, path, value, named):
    folder = copied(files=[file])
    content = json.loads((folder / file).read_text())
    *above, last = path
    functools.reduce(lambda tree, key: tree[key], above, content)[last] = value
    (folder / file).write_text(json.dumps(content))
    status, out, _ = run(capsys, folder)
    assert status == 1
    assert named in out.splitlines()[-1]


def test_a_changed_method_misses(copied, capsys, monkeypatch):
    """Mistakes that the loss does not show: another epsilon; tokens that do not decay."""
    folder = copied(["A_milan_tiny", "H2_trajectory_fixed_batch"])
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "layer_norm", functools.partial(nn.LayerNorm, eps=1e-5))
        status, out, _ = run(capsys, folder, "A_milan_tiny")
        assert status == 1
        assert "A_milan_tiny pred" in out.splitlines()[-1]
    with monkeypatch.context() as patch:
        patch.setattr(optim, "decays", lambda name, parameter: parameter.ndim > 1 and "token" not in name)
        status, out, _ = run(capsys, folder, "H2_trajectory_fixed_batch")
        assert status == 1
        assert "final:cls_token" in out.splitlines()[-1]


def test_what_nothing_computes_misses(copied, capsys):
    folder = copied(["G_schedule"])
    manifest = json.loads((folder / "manifest.json").read_text())
    case = manifest["cases"]["G_schedule"]
    case["tensors"]["lr_segment"] = case["tensors"]["lr_pretrain"]
    with np.load(folder / "G_schedule.npz") as stored:
        np.savez(folder / "G_schedule.npz", **stored, lr_segment=stored["lr_pretrain"])
    (folder / "manifest.json").write_text(json.dumps(manifest))
    status, out, _ = run(capsys, folder)
    assert (status, out.splitlines()[-1]) == (1, "missed: G_schedule lr_segment")


def test_a_folder_that_cannot_be_read(copied, capsys, tmp_path):
    assert run(capsys, tmp_path / "absent")[0] == 2
    folder = copied(["A_milan_tiny"])
    assert "no case B" in run(capsys, folder, "B")[2]
    whole = (folder / "A_milan_tiny.npz").read_bytes()
    (folder / "A_milan_tiny.npz").write_bytes(whole[: len(whole) // 2])
    status, _, err = run(capsys, folder)
    assert status == 2
    assert "A_milan_tiny.npz" in err
    (folder / "manifest.json").write_text('{"cases": {}}')
    assert run(capsys, folder)[0] == 2
    (folder / "manifest.json").write_text('{"cases": {"X": {}}, "seed": 0}')
    assert "'file' is missing" in run(capsys, folder)[2]


# Another seed and sizes that are in no stored case.
SEED = 41
SIZES = {"img_size": 48, "patch_size": 12, "embed_dim": 40, "depth": 2, "num_heads": 5, "batch": 3, "mask_ratio": 0.6}
SIZES |= {"decoder_embed_dim": 24, "decoder_depth": 3, "decoder_num_heads": 2}
N = 16
CLIP = {"image": 30, "patch": 10, "width": 64, "heads": 1, "layers": 2, "embed_dim": 24, "batch": 2, "activation": "QuickGELU"}
CLIP["text"] = {"context_length": 5, "layers": 1, "vocab_size": 11, "width": 64}


def drawn(name: str, *shape: int) -> torch.Tensor:
    return torch.from_numpy(plain.normal(SEED, f"input:{name}", shape)).double()


def weighted(config: dict, prompting: bool, out: int) -> tuple[dict, plain.Weights]:
    shapes = plain.milan_shapes(config, prompting, out)
    found = plain.weights(SEED, shapes)
    for name in ("pos_embed", "decoder_pos_embed"):
        found[name] = plain.table(shapes[name][2], 4)[None]
    return shapes, {name: tensor.requires_grad_("pos_embed" not in name) for name, tensor in found.items()}


def with_gradients(found: dict, weights: plain.Weights) -> dict:
    found["loss"].backward()
    learnt = {name: tensor.grad for name, tensor in weights.items() if tensor.requires_grad}
    norms = torch.stack([gradient.norm() for gradient in learnt.values()])
    first = torch.stack([gradient.flatten()[:8] for gradient in learnt.values()])
    return {**found, "grad_names": list(learnt), "grad_norms": norms, "grad_first8": first}


def masked_case(config: dict, prompting: bool, teacher: str | None, out: int) -> tuple[dict, dict]:
    shapes, weights = weighted(config, prompting, out)
    features = drawn(teacher, 3, 1 + N, out) if teacher else None
    ids = drawn("ids", 3, N).argsort(dim=1, stable=True)
    found = with_gradients(plain.pretrain(weights, config, drawn("images", 3, 3, 48, 48), ids, features), weights)
    mask = torch.ones(3, N).scatter(1, ids[:, : int(N * 0.4)], 0)
    if not teacher:
        del found["loss_per_token"]
    return {"config": config, "param_names_shapes": shapes}, {**found, "mask": mask, "ids_shuffle": ids}


def milan_case() -> tuple[dict, dict]:
    entry, found = masked_case({**SIZES, "use_clip": True, "teacher_dim": 20}, True, "teacher", 20)
    return entry, {**found, "importance": drawn("importance", 3, N).softmax(1)}


def clip_case() -> tuple[dict, dict]:
    shapes = plain.clip_shapes(CLIP)
    entry = {"config": CLIP, "state_dict_names_shapes": shapes, "extra_int_keys": {"vocab_size": 11}}
    return entry, plain.clip(plain.weights(SEED, shapes), CLIP, drawn("images", 2, 3, 30, 30))


VIT = {key: SIZES[key] for key in ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "batch")}


def vit_case(norm: str, **head: tuple) -> tuple[dict, plain.Weights, torch.Tensor]:
    shapes = {**plain.vit_shapes(VIT, norm), **head}
    weights = {**plain.weights(SEED, shapes), "pos_embed": plain.table(40, 4)[None]}
    return shapes, weights, plain.vit(weights, VIT, drawn("images", 3, 3, 48, 48))


def finetune_case() -> tuple[dict, dict]:
    shapes, weights, tokens = vit_case("fc_norm", **{"head.weight": (6, 40), "head.bias": (6,)})
    features = plain.layer_norm(tokens[:, 1:].mean(1), weights, "fc_norm")
    entry = {"config": VIT, "param_names_shapes": shapes, "drop_path_per_block": [0.0, 0.3]}
    return entry, {"features": features, "logits": plain.linear(features, weights, "head")}


def probe_case(steps: int = 3) -> tuple[dict, dict]:
    _, weights, tokens = vit_case("norm", **{"head.1.weight": (6, 40), "head.1.bias": (6,)})
    features = plain.layer_norm(tokens, weights, "norm")[:, 0]
    mean, spread = features.mean(0), features.var(0, correction=0)
    running = {"running_mean": 0.1 * mean, "running_var": 0.9 + 0.1 * features.var(0)}
    found = {"features": features, **running}
    normed = {"eval_initial": (0, torch.ones(40)), "train": (mean, spread), "eval_after_one_train_step": running.values()}
    for name, (centre, variance) in normed.items():
        found[f"logits_{name}"] = plain.linear((features - centre) / (variance + 1e-6).sqrt(), weights, "head.1")
    lars = {"lr": 1.6, "momentum": 0.8, "weight_decay": 0.0, "trust_coefficient": 0.001, "steps": steps}
    return {"config": {**VIT, "lars": lars}}, {**found, **lars_steps(lars)}


def lars_steps(recipe: dict) -> dict:
    """The weight's step is scaled by 0.001 |w| / |g|; the bias's is not."""
    values = plain.weights(SEED, {"lars.weight": (7, 5), "lars.bias": (7,)})
    found: dict[str, list] = {"lars_weight_steps": [], "lars_bias_steps": []}
    momenta = {name: torch.zeros_like(value) for name, value in values.items()}
    for t in range(recipe["steps"]):
        for name, value in values.items():
            gradient = drawn(f"{name}.grad:step{t}", *value.shape)
            if value.ndim > 1:
                gradient = gradient * recipe["trust_coefficient"] * value.norm() / gradient.norm()
            momenta[name] = recipe["momentum"] * momenta[name] + gradient
            values[name] = value - recipe["lr"] * momenta[name]
            found[f"{name.replace('.', '_')}_steps"].append(values[name])
    return {name: torch.stack(column) for name, column in found.items()}


def table_case() -> tuple[dict, dict]:
    table = plain.table(12, 5)
    return {"config": {"sincos": [[12, 5, "cls"]]}}, {"sincos_12": table, "sincos_12_row7": table[7]}


def trajectory_case(steps: int = 4) -> tuple[dict, dict]:
    """AdamW written out: decoupled decay, then the bias-corrected step."""
    shapes, w = weighted(SIZES, True, 20)
    learnt = {name: tensor for name, tensor in w.items() if tensor.requires_grad}
    moments = {name: (torch.zeros_like(t), torch.zeros_like(t)) for name, t in learnt.items()}
    found: dict[str, list] = {"losses": [], "lr_steps": [], "grad_global_norm": [], "ids_shuffle": []}
    for t in range(steps):
        lr = 1e-3 * t / 2 if t < 2 else 1e-3 * 0.5 * (1 + math.cos(math.pi * (t - 2) / (steps - 2)))
        ids = drawn(f"ids:step{t}", 3, N).argsort(dim=1, stable=True)
        loss = plain.pretrain(w, SIZES, drawn(f"images:step{t}", 3, 3, 48, 48), ids, drawn(f"teacher:step{t}", 3, 1 + N, 20))["loss"]
        gradients = dict(zip(learnt, torch.autograd.grad(loss, list(learnt.values())), strict=True))
        with torch.no_grad():
            for name, g in gradients.items():
                m, v = moments[name]
                m.mul_(0.9).add_(g, alpha=0.1)
                v.mul_(0.8).add_(g * g, alpha=0.2)
                learnt[name].mul_(1 - lr * (0.3 if g.ndim > 1 else 0))
                learnt[name].sub_(lr * (m / (1 - 0.9 ** (t + 1))) / ((v / (1 - 0.8 ** (t + 1))).sqrt() + 1e-8))
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients.values()))
        for key, value in zip(found, (loss.item(), lr, norm, ids.numpy()), strict=True):
            found[key].append(value)
    config = {**SIZES, "steps": steps, "optimizer": "torch.optim.AdamW betas=(0.9,0.8) eps=1e-8, wd 0.3 (as timm groups)"}
    config["schedule"] = f"lr before step t, epochs={steps}, warmup_epochs=2, lr=1e-3, min_lr=0 (lr=0 at t=0)"
    final = {f"final:{name}": w[name] for name in ("mask_token", "decoder_pred.bias")}
    norms = [tensor.norm().item() for tensor in w.values()]
    return {"config": config}, {**found, **final, "param_names": list(w), "final_param_norms": norms}


def test_other_seeds_and_sizes_against_a_plain_rendering(tmp_path, capsys):
    mae = {**SIZES, "use_clip": False, "norm_pix_loss": True}
    cases = {
        "A_milan_other": milan_case(),
        "C7_mae_pixels": masked_case(mae, False, None, 3 * 12 * 12),
        "C8_mae_clip": masked_case({**SIZES, "use_clip": True, "teacher_dim": 28}, False, "teacher28", 28),
        "D_clip_other": clip_case(),
        "E_finetune_other": finetune_case(),
        "F_probe_other": probe_case(),
        "I_table_other": table_case(),
        "H_trajectory_other": trajectory_case(),
    }
    plain.write(tmp_path / "other", SEED, cases)
    status, out, _ = run(capsys, tmp_path / "other")
    assert status == 0, out
    plain.write(tmp_path / "wrong", SEED + 1, {"D_clip_other": cases["D_clip_other"]})
    assert run(capsys, tmp_path / "wrong")[0] == 1


def test_monte_carlo_against_exact_probabilities():
    """Two kept of four without replacement, all orders summed by hand."""
    from tests.golden_cases import keep_probability

    odds = [0.5, 0.3, 0.15, 0.05]
    exact = [sum(a * (1 if i == j else 0) + (b * a / (1 - b) if i != j else 0) for j, b in enumerate(odds)) for i, a in enumerate(odds)]
    ours = keep_probability(torch.tensor(odds), 2, 50_000)
    assert masking.n_visible(4, 0.5) == 2
    assert torch.allclose(ours, torch.tensor(exact, dtype=torch.float64), atol=0.012)
