"""Run every variant of the paper's ablation through its stages in one process, from drawn images to its row in the table."""

import dataclasses
from pathlib import Path

import pandas
import pytest
import torch
from safetensors.torch import load_file

from milan.core.validation import validate
from milan.ingest.corrupting import STRENGTHS
from milan.method.encoder import Encoder
from milan.params import Params
from milan.training.weights import save_weights
from stages import (
    attentive_probe,
    dense_probe,
    extract_targets,
    finetune,
    linear_eval,
    prepare_ade20k,
    prepare_imagenet,
    prepare_robustness,
    pretrain,
    report,
    robustness,
    segment,
    teacher,
)
from tests.conftest import ROOT, change, run_main

SETTINGS = {
    "runtime.processes": 1,
    "compute.precision": "fp32",
    "prepare_imagenet.train": 40,
    "prepare_imagenet.val": 20,
    "prepare_imagenet.pairs": 40,
    "prepare_ade20k.train": 8,
    "prepare_ade20k.val": 4,
    "prepare_robustness.images": 1,
    "teacher.epochs": 1,
    "teacher.warmup_epochs": 0.5,
    "extract_targets.views": 1,
    "extract_targets.figure_images": 4,
    "pretrain.epochs": 1,
    "pretrain.monitor_epochs": 1,
    "linear_eval.epochs": 1,
    "attentive_probe.epochs": 2,
    "finetune.epochs": 1,
    "finetune.labels": 1.0,
    "segment.epochs": 1,
    **{f"{stage}.batch_size": 20 for stage in ("teacher", "pretrain", "linear_eval", "attentive_probe", "finetune")},
    **{f"{stage}.micro_batch": 20 for stage in ("teacher", "pretrain", "linear_eval", "attentive_probe", "finetune")},
    **{f"{stage}.{size}": 4 for stage in ("segment", "dense_probe") for size in ("batch_size", "micro_batch")},
    "dense_probe.epochs": 2,
    "dense_probe.views": 1,
}
LOOKS = {"finetune.eval_epochs": 1, "linear_eval.eval_epochs": 1}
METRICS, CURVES = Path("metrics"), Path("curves")


def run(module, params: Params, name: str, **arguments) -> dict:
    return run_main(module, params, Path("outs", name), METRICS / f"{name}.json", CURVES / f"{name}.csv", **arguments)


@pytest.fixture
def params(tree, workplace) -> Params:
    for key, value in SETTINGS.items():
        change(tree, key, value)
    return validate(Params, tree, "params.yaml")


def test_every_variant_gets_its_row(params, workplace):
    records, scenes, clip, bank = (
        Path("outs", name) for name in ("prepare_imagenet", "prepare_ade20k", "teacher", "extract_targets")
    )
    run(prepare_imagenet, params, records.name)
    run(prepare_ade20k, params, scenes.name)
    run(teacher, params, clip.name, records=records)
    run(extract_targets, params, bank.name, records=records, teacher=clip)
    sets = Path("outs", "prepare_robustness")
    packed = run(prepare_robustness, params, sets.name, records=records)
    assert [packed[name] for name in packed if name != "recipe"] == [20] * 25, "one of each class, corruption and strength"
    metrics, encoders = {}, {}
    for variant in params.variants:
        own = {"variant": variant, "seed": 0, "weights": Path("outs/pretrain", f"{variant}-0")}
        metrics[variant] = run(pretrain, params, f"pretrain/{variant}-0", records=records, teacher=clip, bank=bank, **own)
        metrics[variant] |= run(linear_eval, params, f"linear_eval/{variant}-0", records=records, teacher=clip, **own)
        metrics[variant] |= run(attentive_probe, params, f"attentive_probe/{variant}-0", records=records, **own)
        confusion = Path("confusion.csv")
        metrics[variant] |= run(finetune, params, f"finetune/{variant}-0", records=records, confusion=confusion, **own)
        metrics[variant] |= run(segment, params, f"segment/{variant}-0", scenes=scenes, **own)
        metrics[variant] |= run(dense_probe, params, f"dense_probe/{variant}-0", scenes=scenes, **own)
        if variant == "milan":
            heads = {head: Path("outs", stage, "milan-0") for head, stage in (("linear", "linear_eval"), ("classifier", "finetune"))}
            metrics[variant] |= run(robustness, params, f"robustness/{variant}-0", sets=sets, **heads, **own)
        encoders[variant] = load_file(own["weights"] / "encoder.safetensors")

    # So few images are all in the monitor's set: its last neighbours are those of the linear evaluation.
    for variant in params.variants[1:]:
        curve = pandas.read_csv(CURVES / f"pretrain/{variant}-0.csv")
        assert round(curve["knn_top1"].iloc[-1], 4) == metrics[variant]["linear_eval/knn_top1"]
        assert 1 < curve["rankme"].iloc[-1] <= 40 and curve["rankme"].count() == 1
    # Without the monitor the weights are the same bytes.
    unwatched = dataclasses.replace(params, pretrain=dataclasses.replace(params.pretrain, monitor_epochs=0))
    run(pretrain, unwatched, "unwatched", records=records, teacher=clip, bank=bank, variant="milan", seed=0)
    for file in ("encoder.safetensors", "decoder.safetensors"):
        assert Path("outs/unwatched", file).read_bytes() == Path("outs/pretrain/milan-0", file).read_bytes()

    # The variants predict nothing, the pixels of a patch, or the teacher's features.
    decoders = {variant: Path("outs/pretrain", f"{variant}-0", "decoder.safetensors") for variant in params.variants}
    assert [variant for variant in params.variants if not decoders[variant].exists()] == ["scratch"]
    widths = {v: load_file(path)["decoder_pred.weight"].shape[0] for v, path in decoders.items() if path.exists()}
    features = params.teacher.tiny.embed_dim
    assert widths == {"mae": 3 * 8**2, "clip_target": features, "prompt_decoder": features, "milan": features}
    zero_shot = {variant for variant in params.variants if "linear_eval/zero_shot_top1" in metrics[variant]}
    assert zero_shot == {"clip_target", "prompt_decoder", "milan"}
    assert "pretrain/loss" not in metrics["scratch"] and all(0 < metrics[v]["pretrain/loss"] < 4 for v in widths)
    # With half of the two labels of each class, every variant has those of the same images.
    few = dataclasses.replace(params, linear_eval=dataclasses.replace(params.linear_eval, labels=0.5))
    for variant in ("mae", "milan"):
        weights = Path("outs/pretrain", f"{variant}-0")
        run(linear_eval, few, f"few/{variant}", records=records, teacher=clip, weights=weights, variant=variant, seed=0)
    lists = [Path("outs/few", variant, "labels.csv").read_text() for variant in ("mae", "milan")]
    assert lists[0] == lists[1] and len({line.split(",")[2] for line in lists[0].splitlines()[1:]}) == lists[0].count("\n") - 1 == 20
    # All variants begin with the same encoder and end with different ones.
    first = [encoders[variant]["blocks.0.attn.qkv.weight"] for variant in params.variants]
    assert all(not torch.equal(a, b) for i, a in enumerate(first) for b in first[:i])
    assert all((first[0] - other).abs().max() < 0.05 for other in first[1:])  # two steps of AdamW away

    given = {"curves": CURVES, "published": ROOT / "reports/published.csv"}
    run_main(report, params, out=Path("reports"), metrics=METRICS, curve=None, **given)
    corrupted = metrics["milan"]["robustness/finetune/corrupted_top1"]
    names = [f"robustness/finetune/{name}_top1" for name in STRENGTHS]
    assert corrupted == pytest.approx(sum(metrics["milan"][name] for name in names) / 5, abs=1e-3)
    rows = [line.split(" | ")[0] for line in Path("reports/table.md").read_text().splitlines() if line.startswith("| ")]
    assert rows[2:7] == ["| No pretraining", "| MAE", "| CLIP target", "| CLIP target, prompting decoder", "| MILAN"]


def test_evaluations_in_between_change_nothing_else(params, tree, workplace):
    """Weights, confusion matrix and last metrics are those of a training that is evaluated once."""
    records, encoder = Path("outs/prepare_imagenet"), Path("outs/encoder")
    run(prepare_imagenet, params, records.name)
    save_weights(encoder / "encoder.safetensors", Encoder(params.model).vit.state_dict())
    for key in ("finetune.epochs", "linear_eval.epochs"):
        change(tree, key, 2)
    once = validate(Params, tree, "params.yaml")
    for key, value in LOOKS.items():
        change(tree, key, value)
    each = validate(Params, tree, "params.yaml")
    given = {"records": records, "weights": encoder, "variant": "scratch", "seed": 0}
    for module, weights, more in (
        (finetune, "classifier.safetensors", {"confusion": Path("confusion.csv")}),
        (linear_eval, "head.safetensors", {"teacher": Path("none")}),
    ):
        stage = module.__name__.removeprefix("stages.")
        last = run(module, once, f"{stage}/once", **given, **more)
        seen = run(module, each, f"{stage}/each", **given, **more)
        files = [Path("outs", stage, name, weights).read_bytes() for name in ("once", "each")]
        assert files[0] == files[1] and last.pop("recipe") != seen.pop("recipe")
        curves = [pandas.read_csv(CURVES / stage / f"{name}.csv") for name in ("once", "each")]
        assert curves[0].equals(curves[1][list(curves[0])])
        tops = curves[1]["val/top1"].dropna()
        assert list(tops.index) == [1, 3] and round(tops[3], 4) == last[f"{stage}/top1"]
        assert seen == {**last, f"{stage}/best_top1": round(tops.max(), 4)}
