"""The frozen dense probe: DINOv2's linear segmentation on the frozen encoder, with the scenes and scores of `segment`.

As published (docs/fidelity.md): batch norm and one linear layer on the last block's patch features, 40,000 steps of 16 crops
of 512 px, AdamW, new crops every epoch (views: 0). With views: V the features of V fixed crops of each scene are extracted
once and the head trains on them in memory. Costs: demo a few seconds a variant. No published result of MILAN is known.
"""

from argparse import Namespace

import torch

from milan.data import seeding
from milan.data.records import Records
from milan.evaluation.frozen import training_data
from milan.evaluation.linear import ProbeLoss
from milan.params import Params
from milan.segmentation import dense, inference, scenes, upernet
from milan.stage import Kind, Stage, run
from milan.training import batch_norm, distributed, optim
from milan.training.device import resolve_params, set_up
from milan.training.loop import FitSettings, fit
from milan.training.resume import SavedState
from milan.training.weights import save_weights

KIND = Kind(varies=True, reads=("scenes", "weights"), folders=("out",), files=("metrics", "curve"), evaluates="weights")


def main(stage: Stage) -> None:
    params, args = stage.params, stage.args
    stage.tracker.reads(Records(args.scenes, "train"), Records(args.scenes, "val"))
    inputs = {"scenes": args.scenes / "manifest.json", "encoder": args.weights / "encoder.safetensors"}
    identity = stage.identify({"dense_probe": params.dense_probe, "model": params.model, "compute": params.compute}, **inputs)
    saved = stage.keep(SavedState(stage.slug, identity, stage.code))
    result = distributed.launch(train, resolve_params(params, stage.tracker), args, saved, stage)
    stage.write_curve(result["curve"])
    stage.write_metrics(result["metrics"], identity)
    stage.tracker.model(args.out, f"dense-head-{args.variant}-{args.seed}")


def train(params: Params, args: Namespace, saved: SavedState, stage: Stage) -> dict:
    device, section = set_up(params.compute), params.dense_probe
    precision, records = params.compute.precision, Records(args.scenes, "train")
    encode = dense.frozen_encoder(args.weights / "encoder.safetensors", params.model, section.crop_size, precision, device)
    seeding.seed_globals(args.seed, "dense_probe init")
    head = build(params, len(records.manifest["classes"]), device)
    crops = scenes.SceneSamples(records, args.seed, section)
    samples, inputs = training_data(crops, encode, section, device, params.runtime.workers)
    settings = FitSettings(
        stage.title, section, params.compute, params.runtime, args.seed, saved, stage.tracker.point, optim.poly_lr_at
    )
    curve = fit(ProbeLoss(head, upernet.pixel_loss), samples, optimizer_of(params, head), settings, inputs)
    if distributed.rank() == 0:
        save_weights(args.out / "head.safetensors", head.state_dict())
    val = Records(args.scenes, "val")
    scores = inference.assess(lambda images: (head(encode(images)), None), val, section, precision, device)
    return {"curve": curve, "metrics": {f"dense_probe/{name}": value for name, value in scores.items()}}


def build(params: Params, classes: int, device: torch.device) -> dense.DenseHead:
    section, norm = params.dense_probe, "sync" if device.type == "cuda" else "batch"
    if norm == "sync":
        batch_norm.say_what_it_sees("dense_probe", section.batch_size, section.micro_batch)
    return dense.DenseHead(params.model.encoder.embed_dim, classes, norm).to(device)


def optimizer_of(params: Params, head: dense.DenseHead) -> torch.optim.Optimizer:
    """Return AdamW with weight decay on all parameters, those of batch norm and the bias included, as published."""
    section = params.dense_probe
    return optim.adamw([{"params": list(head.parameters()), "weight_decay": section.weight_decay}], section.betas)


if __name__ == "__main__":
    with distributed.torchrun():
        run("dense_probe", main, __doc__, KIND)
