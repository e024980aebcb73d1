"""Attentive probe: V-JEPA's classifier on all tokens of the frozen encoder, with the data and the crops of `linear_eval`.

Where the linear probe reads the class token alone, a learned query here attends to the class token and the patches. As published
(docs/fidelity.md): 20 epochs of 1,024 images a step, AdamW, a new crop every epoch (views: 0). With views: V the tokens of V fixed
crops are extracted once and the head trains on them in memory. Costs: demo a few seconds a variant. No published result of
MILAN is known.
"""

from argparse import Namespace
from collections.abc import Callable

import torch

from milan.data import seeding
from milan.data.evaluation_view import CentreSamples
from milan.data.records import Records
from milan.evaluation import augmentation, frozen, inference, scores
from milan.evaluation.attentive import AttentiveHead
from milan.evaluation.linear import ProbeLoss
from milan.evaluation.samples import LabelledSamples
from milan.params import Params
from milan.stage import Kind, Stage, run
from milan.training import distributed, optim
from milan.training.device import autocast, resolve_params, set_up
from milan.training.loop import FitSettings, fit
from milan.training.resume import SavedState
from milan.training.weights import save_weights

KIND = Kind(varies=True, reads=("records", "weights"), folders=("out",), files=("metrics", "curve"), evaluates="weights")


def main(stage: Stage) -> None:
    params, args = stage.params, stage.args
    stage.tracker.reads(Records(args.records, "train"), Records(args.records, "val"))
    inputs = {"records": args.records / "manifest.json", "encoder": args.weights / "encoder.safetensors"}
    sections = {"attentive_probe": params.attentive_probe, "model": params.model, "compute": params.compute}
    identity = stage.identify(sections, **inputs)
    saved = stage.keep(SavedState(stage.slug, identity, stage.code))
    result = distributed.launch(train, resolve_params(params, stage.tracker), args, saved, stage)
    stage.write_curve(result["curve"])
    stage.write_metrics(result["metrics"], identity)
    stage.tracker.model(args.out, f"attentive-head-{args.variant}-{args.seed}")


def train(params: Params, args: Namespace, saved: SavedState, stage: Stage) -> dict:
    device, section = set_up(params.compute), params.attentive_probe
    encode = frozen.frozen_encoder(params, args.weights, device)
    records = Records(args.records, "train")
    seeding.seed_globals(args.seed, "attentive_probe init")
    head = build(params, len(records.classes)).to(device)
    crops = LabelledSamples(records, args.seed, params.model.image_size, section.crop_scale, augmentation.draw_simple_crop)
    samples, inputs = frozen.training_data(crops, encode, section, device, params.runtime.workers)
    settings = FitSettings(stage.title, section, params.compute, params.runtime, args.seed, saved, stage.tracker.point)
    curve = fit(ProbeLoss(head), samples, optimizer_of(params, head), settings, inputs)
    if distributed.rank() == 0:
        save_weights(args.out / "head.safetensors", head.state_dict())
    return {"curve": curve, "metrics": assess(params, Records(args.records, "val"), encode, head, device)}


def build(params: Params, classes: int) -> AttentiveHead:
    return AttentiveHead(params.model.encoder.embed_dim, params.model.encoder.num_heads, classes)


def optimizer_of(params: Params, head: AttentiveHead) -> torch.optim.Optimizer:
    section = params.attentive_probe
    return optim.adamw(optim.decay_groups(head, section.weight_decay), section.betas)


def assess(params: Params, val: Records, encode: Callable, head: AttentiveHead, device: torch.device) -> dict[str, float]:
    """Return top-1 and top-5 in % over the validation images."""
    section = params.attentive_probe

    def logits(images: torch.Tensor) -> torch.Tensor:
        with autocast(params.compute.precision, device):
            return head(encode(images))

    centre = CentreSamples(val, section.resize, params.model.image_size)
    outputs, labels = inference.model_outputs(logits, centre, section.micro_batch, device, "attentive", params.runtime.workers)
    return dict(scores.accuracy(outputs, labels, "attentive_probe"))


if __name__ == "__main__":
    with distributed.torchrun():
        run("attentive_probe", main, __doc__, KIND)
