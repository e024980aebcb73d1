"""Every variant of the paper's ablation through its own stages, from drawn images to the row in the table, in one process."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from milan.core.validation import validate
from milan.params import Params
from stages import extract_targets, finetune, linear_eval, prepare_ade20k, prepare_imagenet, pretrain, report, segment, teacher
from tests.conftest import ROOT, change, run_main

SETTINGS = {
    "runtime.processes": 1,
    "compute.precision": "fp32",
    "prepare_imagenet.train": 40,
    "prepare_imagenet.val": 20,
    "prepare_imagenet.pairs": 40,
    "prepare_ade20k.train": 8,
    "prepare_ade20k.val": 4,
    "teacher.epochs": 1,
    "extract_targets.views": 1,
    "extract_targets.figure_images": 4,
    "pretrain.epochs": 1,
    "linear_eval.epochs": 1,
    "finetune.epochs": 1,
    "finetune.labels": 1.0,
    "segment.epochs": 1,
    **{f"{stage}.batch_size": 20 for stage in ("teacher", "pretrain", "linear_eval", "finetune")},
    **{f"{stage}.micro_batch": 20 for stage in ("teacher", "pretrain", "linear_eval", "finetune")},
    "segment.batch_size": 4,
    "segment.micro_batch": 4,
}
METRICS, CURVES = Path("metrics"), Path("curves")


def run(module, p: Params, name: str, **arguments) -> dict:
    return run_main(module, p, Path("outs", name), METRICS / f"{name}.json", CURVES / f"{name}.csv", **arguments)


@pytest.fixture
def p(tree, workplace) -> Params:
    for place, value in SETTINGS.items():
        change(tree, place, value)
    return validate(Params, tree, "params.yaml")


def test_every_variant_gets_its_row(p, workplace):
    records, scenes, teached, bank = (
        Path("outs", name) for name in ("prepare_imagenet", "prepare_ade20k", "teacher", "extract_targets")
    )
    run(prepare_imagenet, p, records.name)
    run(prepare_ade20k, p, scenes.name)
    run(teacher, p, teached.name, records=records)
    run(extract_targets, p, bank.name, records=records, teacher=teached)
    found, encoders = {}, {}
    for variant in p.variants:
        own = {"variant": variant, "seed": 0, "weights": Path("outs/pretrain", f"{variant}-0")}
        found[variant] = run(pretrain, p, f"pretrain/{variant}-0", records=records, teacher=teached, bank=bank, **own)
        found[variant] |= run(linear_eval, p, f"linear_eval/{variant}-0", records=records, teacher=teached, **own)
        found[variant] |= run(finetune, p, f"finetune/{variant}-0", records=records, confusion=Path("confusion.csv"), **own)
        found[variant] |= run(segment, p, f"segment/{variant}-0", scenes=scenes, **own)
        encoders[variant] = load_file(own["weights"] / "encoder.safetensors")

    # What each predicts: nothing, a patch's pixels, the teacher's features.
    decoders = {variant: Path("outs/pretrain", f"{variant}-0", "decoder.safetensors") for variant in p.variants}
    assert [variant for variant in p.variants if not decoders[variant].exists()] == ["scratch"]
    widths = {v: load_file(path)["decoder_pred.weight"].shape[0] for v, path in decoders.items() if path.exists()}
    features = p.teacher.tiny.embed_dim
    assert widths == {"mae": 3 * 8**2, "clip_target": features, "prompt_decoder": features, "milan": features}
    assert {v for v in p.variants if "linear_eval/zero_shot_top1" in found[v]} == {"clip_target", "prompt_decoder", "milan"}
    assert "pretrain/loss" not in found["scratch"] and all(0 < found[v]["pretrain/loss"] < 4 for v in widths)
    # All began with the same encoder, and each learned something of its own.
    first = [encoders[variant]["blocks.0.attn.qkv.weight"] for variant in p.variants]
    assert all(not torch.equal(a, b) for i, a in enumerate(first) for b in first[:i])
    assert all((first[0] - other).abs().max() < 0.05 for other in first[1:])  # two steps of AdamW away

    given = {"curves": CURVES, "published": ROOT / "reports/published.csv"}
    run_main(report, p, out=Path("reports"), metrics=METRICS, curve=None, **given)
    rows = [line.split(" | ")[0] for line in Path("reports/table.md").read_text().splitlines() if line.startswith("| ")]
    assert rows[2:7] == ["| No pretraining", "| MAE", "| CLIP target", "| CLIP target, prompting decoder", "| MILAN"]
