"""End-to-end fine-tuning of the encoder with labels (main_finetune.py of the release).

As published: 100 epochs, AdamW, layer-wise learning rate decay 0.65, mixup, cutmix, RandAugment, random erasing, an evaluation
after every epoch (eval_epochs: 1): the metrics then hold the best of them beside the last.
Costs: demo a quarter of a minute a variant. Expect 85.4 (paper) or 85.2 / 85.3 (independent re-runs) for MILAN
ViT-B/16 on ImageNet.
"""

from argparse import Namespace
from functools import partial

import torch

from milan.data import seeding, transforms
from milan.data.evaluation_view import CentreSamples
from milan.data.records import Records
from milan.evaluation import augmentation, inference, scores
from milan.evaluation.classifier import ClassifierInfo, FinetuneLoss, build_classifier, save_classifier
from milan.evaluation.samples import LabelledSamples, balanced_subset
from milan.params import Params
from milan.stage import Kind, Stage, run
from milan.training import distributed, optim
from milan.training.device import autocast, resolve_params, set_up
from milan.training.loop import FitSettings, fit
from milan.training.resume import SavedState
from milan.training.weights import load_weights

KIND = Kind(
    varies=True, reads=("records", "weights"), folders=("out",), files=("metrics", "curve", "confusion"), evaluates="weights"
)


def main(stage: Stage) -> None:
    params, args = stage.params, stage.args
    stage.tracker.reads(Records(args.records, "train"), Records(args.records, "val"))
    inputs = {"records": args.records / "manifest.json", "encoder": args.weights / "encoder.safetensors"}
    identity = stage.identify({"finetune": params.finetune, "model": params.model, "compute": params.compute}, **inputs)
    saved = stage.keep(SavedState(stage.slug, identity, stage.code))
    result = distributed.launch(train, resolve_params(params, stage.tracker), args, saved, stage)
    stage.write_curve(result["curve"])
    stage.write_confusion(result["confusion"])
    stage.write_metrics(result["metrics"], identity)
    tags = {"data": params.data.title, "top1": stage.metrics["finetune/top1"]}
    registered = f"milan-{params.data.name}-classifier"
    stage.tracker.classifier(args.out, f"classifier-{args.variant}-{args.seed}", registered, args.variant, tags)


def train(params: Params, args: Namespace, saved: SavedState, stage: Stage) -> dict:
    device, section = set_up(params.compute), params.finetune
    records = Records(args.records, "train")
    classes = len(records.classes)
    seeding.seed_globals(args.seed, "finetune init")
    vit = build_classifier(params.model, section, classes, load_weights(args.weights / "encoder.safetensors")).to(device)
    optimizer = optim.adamw(layer_groups(vit, section), section.betas)
    val = Records(args.records, "val")

    def evaluate() -> dict[str, float]:
        return dict(scores.accuracy(*outputs(params, vit, val, device), "val"))

    looks = {"monitor": evaluate, "monitor_epochs": section.eval_epochs}
    settings = FitSettings(stage.title, section, params.compute, params.runtime, args.seed, saved, stage.tracker.point, **looks)
    curve = fit(
        FinetuneLoss(vit, section, classes),
        samples(params, records, args.seed),
        optimizer,
        settings,
        partial(inputs, section.random_erasing),
    )
    if distributed.rank() == 0:
        save_classifier(args.out, vit, ClassifierInfo(params.model, section.pooling, section.resize, records.manifest["classes"]))
    logits, labels = outputs(params, vit, val, device, "fine-tuned")
    metrics = {**dict(scores.accuracy(logits, labels, "finetune")), **dict(scores.best_top1(curve, "finetune"))}
    return {"curve": curve, "metrics": metrics, "confusion": confusion(logits, labels, val.manifest["classes"])}


def layer_groups(vit: torch.nn.Module, section) -> list[dict]:
    depth = len(vit.blocks)
    return optim.layer_decay_groups(
        vit, section.weight_decay, section.layer_decay, partial(optim.vit_layer_id, depth=depth), depth
    )


def samples(params: Params, records: Records, seed: int) -> LabelledSamples:
    section = params.finetune
    augment = augmentation.FinetuneAugment(section.rand_augment, params.model.image_size) if section.rand_augment else None
    subset = balanced_subset(records.column("label"), section.labels, seed) if section.labels < 1 else None
    return LabelledSamples(records, seed, params.model.image_size, section.crop_scale, transforms.draw_crop, augment, subset)


def inputs(erasing: float, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    images = transforms.normalise(batch["image"])
    return augmentation.random_erasing(images, erasing) if erasing else images, batch["label"]


def outputs(
    params: Params, vit: torch.nn.Module, val: Records, device: torch.device, name: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits (n, classes) and labels (n,) of the validation images; progress is shown under `name`."""
    precision = params.compute.precision

    def logits(images: torch.Tensor) -> torch.Tensor:
        with autocast(precision, device):
            return vit(images)

    centre = CentreSamples(val, params.finetune.resize, params.model.image_size)
    return inference.model_outputs(logits, centre, 256, device, name, params.runtime.workers)


def confusion(logits: torch.Tensor, labels: torch.Tensor, names: list[str]) -> list[tuple[str, str]]:
    """Return the names of actual and predicted class of the images in the confusion matrix."""
    pairs = scores.confusion_pairs(logits.argmax(dim=1), labels)
    return [(names[actual], names[predicted]) for actual, predicted in pairs.tolist()]


if __name__ == "__main__":
    with distributed.torchrun():
        run("finetune", main, __doc__, KIND)
