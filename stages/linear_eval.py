"""Linear evaluation (main_linprobe.py of the release): one linear layer on the frozen encoder's class token.

As published: 100 epochs, LARS, a global batch of 16,384, a new crop every epoch (views: 0). With views: V the
features of V fixed crops are extracted once and the layer trains on them in memory. Beside it, what needs no training:
nearest neighbours of the same features, and where the student predicts CLIP features, zero-shot classification by its own
decoder and the teacher's texts of the classes, of whole images and of masked ones (random masks, for every variant).
Costs: demo a few seconds. Expect 79.9 (paper) or 78.9 (two independent re-runs) for MILAN ViT-B/16 on ImageNet.
"""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.data import Dataset

from milan.data import seeding, transforms
from milan.data.evaluation_view import CentreSamples
from milan.data.records import Records
from milan.evaluation import augmentation, inference, scores, zero_shot
from milan.evaluation.linear import FeatureViews, LinearHead, ProbeLoss
from milan.evaluation.samples import EpochView, LabelledSamples
from milan.method.encoder import load_encoder
from milan.params import Params
from milan.stage import Kind, Stage, run
from milan.training import distributed, optim
from milan.training.device import autocast, resolve_precision, set_up
from milan.training.loop import FitSettings, fit
from milan.training.resume import SavedState
from milan.training.weights import save_weights

KIND = Kind(
    varies=True, reads=("records", "weights", "teacher"), folders=("out",), files=("metrics", "curve"), evaluates="weights"
)


def main(stage: Stage) -> None:
    p, a = stage.params, stage.args
    stage.tracker.reads(Records(a.records, "train"), Records(a.records, "val"))
    sections = {"linear_eval": p.linear_eval, "model": p.model, "compute": p.compute}
    sections["pretrain"] = {"row": p.pretrain.ablation[a.variant], "mask_ratio": p.pretrain.mask_ratio}
    inputs = {path.name: path for path in zero_shot.input_files(a.weights, a.teacher)}
    inputs |= {"records": a.records / "manifest.json", "encoder": a.weights / "encoder.safetensors"}
    identity = stage.identify(sections, **inputs)
    saved = stage.keep(SavedState(stage.slug, identity, stage.code))
    result = distributed.launch(train, p, a, saved, stage)
    stage.write_curve(result["curve"])
    stage.write_metrics(result["metrics"], identity)
    stage.tracker.model(a.out, f"head-{a.variant}-{a.seed}")


def train(p: Params, a: Namespace, saved: SavedState, stage: Stage) -> dict:
    device, x = set_up(p.compute), p.linear_eval
    encode = frozen_encoder(p, a.weights, device)
    records = Records(a.records, "train")
    seeding.seed_globals(a.seed, "linear_eval init")
    head = LinearHead(p.model.encoder.embed_dim, len(records.classes)).to(device)
    samples, inputs = training_data(p, a.seed, records, encode, device)
    settings = FitSettings(stage.title, x, p.compute, p.runtime, a.seed, saved, stage.tracker.point)
    curve = fit(ProbeLoss(head), samples, optimizer_of(p, head), settings, inputs)
    if distributed.rank() == 0:
        save_weights(a.out / "head.safetensors", head.state_dict())
    val = Records(a.records, "val")
    found = zero_shot.accuracies(p, a.variant, a.seed, a.weights, a.teacher, val, device)
    metrics = {**assess(p, records, val, encode, head, device), **{f"linear_eval/{name}": top for name, top in found.items()}}
    return {"curve": curve, "metrics": metrics}


def frozen_encoder(p: Params, weights: Path, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """Normalised images (B, 3, S, S) -> class-token features (B, D), without gradient."""
    encoder = load_encoder(weights / "encoder.safetensors", p.model).to(device).eval()
    precision = resolve_precision(p.compute, device)

    @torch.no_grad()
    def encode(images: torch.Tensor) -> torch.Tensor:
        with autocast(precision, device):
            return encoder(images)[:, 0].float()

    return encode


def training_data(p: Params, seed: int, records: Records, encode: Callable, device: torch.device) -> tuple[Dataset, Callable]:
    """The data set and how its batches become (features, labels)."""
    x = p.linear_eval
    crops = LabelledSamples(records, seed, p.model.image_size, x.crop_scale, augmentation.draw_simple_crop)
    if x.views == 0:
        return crops, lambda batch: (encode(transforms.normalise(batch["image"])), batch["label"])
    views = [
        inference.model_outputs(encode, EpochView(crops, v), x.micro_batch, device, "features", p.runtime.workers) for v in range(x.views)
    ]
    return FeatureViews([features for features, _ in views], views[0][1]), lambda batch: (batch["features"], batch["label"])


def optimizer_of(p: Params, head: LinearHead) -> torch.optim.Optimizer:
    x = p.linear_eval
    if x.optimizer == "lars":
        return optim.lars(head, x.momentum, x.weight_decay)
    return optim.adamw(optim.decay_groups(head, x.weight_decay), (x.momentum, 0.999))


def assess(p: Params, train: Records, val: Records, encode: Callable, head: LinearHead, device: torch.device) -> dict:
    """Top-1 and top-5 of the linear layer, and of nearest neighbours on the same features."""
    x = p.linear_eval
    features = [
        inference.model_outputs(
            encode, CentreSamples(records, x.resize, p.model.image_size), x.micro_batch, device, "features", p.runtime.workers
        )
        for records in (train, val)
    ]
    logits = torch.cat([head(part.to(device)).cpu() for part in features[1][0].split(x.micro_batch)])
    found = scores.accuracy(logits, features[1][1], "linear_eval")
    return {**dict(found), "linear_eval/knn_top1": scores.knn_top1(*features[0], *features[1], device)}


if __name__ == "__main__":
    with distributed.torchrun():
        run("linear_eval", main, __doc__, KIND)
