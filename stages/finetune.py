"""End-to-end fine-tuning of the encoder with labels (main_finetune.py of the release).

As published: 100 epochs, AdamW, layer-wise learning rate decay 0.65, mixup, cutmix, RandAugment, random erasing.
Costs: demo about half a minute a variant. Expect 85.4 (paper) or 85.2 / 85.3 (independent re-runs) for MILAN
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
from milan.training.device import autocast, resolve_precision, set_up
from milan.training.loop import FitSettings, fit
from milan.training.resume import SavedState
from milan.training.weights import load_weights

KIND = Kind(
    varies=True, reads=("records", "weights"), folders=("out",), files=("metrics", "curve", "confusion"), evaluates="weights"
)


def main(stage: Stage) -> None:
    p, a = stage.params, stage.args
    stage.tracker.reads(Records(a.records, "train"), Records(a.records, "val"))
    inputs = {"records": a.records / "manifest.json", "encoder": a.weights / "encoder.safetensors"}
    identity = stage.identify({"finetune": p.finetune, "model": p.model, "compute": p.compute}, **inputs)
    saved = stage.keep(SavedState(stage.slug, identity, stage.code))
    result = distributed.launch(train, p, a, saved, stage)
    stage.write_curve(result["curve"])
    stage.write_confusion(result["confusion"])
    stage.write_metrics(result["metrics"], identity)
    stage.tracker.classifier(a.out, f"classifier-{a.variant}-{a.seed}", f"milan-{p.scale}-classifier", a.variant)


def train(p: Params, a: Namespace, saved: SavedState, stage: Stage) -> dict:
    device, x = set_up(p.compute), p.finetune
    records = Records(a.records, "train")
    classes = len(records.classes)
    seeding.seed_globals(a.seed, "finetune init")
    vit = build_classifier(p.model, x, classes, load_weights(a.weights / "encoder.safetensors")).to(device)
    optimizer = optim.adamw(layer_groups(vit, x), x.betas)
    settings = FitSettings(stage.title, x, p.compute, p.runtime, a.seed, saved, stage.tracker.point)
    curve = fit(
        FinetuneLoss(vit, x, classes), samples(p, records, a.seed), optimizer, settings, partial(inputs, x.random_erasing)
    )
    if distributed.rank() == 0:
        save_classifier(a.out, vit, ClassifierInfo(p.model, x.pooling, x.resize, records.manifest["classes"]))
    return {"curve": curve, **assess(p, vit, Records(a.records, "val"), device)}


def layer_groups(vit: torch.nn.Module, x) -> list[dict]:
    depth = len(vit.blocks)
    return optim.layer_decay_groups(vit, x.weight_decay, x.layer_decay, partial(optim.vit_layer_id, depth=depth), depth)


def samples(p: Params, records: Records, seed: int) -> LabelledSamples:
    x = p.finetune
    augment = augmentation.FinetuneAugment(x.rand_augment, p.model.image_size) if x.rand_augment else None
    subset = balanced_subset(records.column("label"), x.labels, seed) if x.labels < 1 else None
    return LabelledSamples(records, seed, p.model.image_size, x.crop_scale, transforms.draw_crop, augment, subset)


def inputs(erasing: float, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    images = transforms.normalise(batch["image"])
    return augmentation.random_erasing(images, erasing) if erasing else images, batch["label"]


def assess(p: Params, vit: torch.nn.Module, val: Records, device: torch.device) -> dict:
    precision = resolve_precision(p.compute, device)

    def logits(images: torch.Tensor) -> torch.Tensor:
        with autocast(precision, device):
            return vit(images)

    centre = CentreSamples(val, p.finetune.resize, p.model.image_size)
    found, labels = inference.model_outputs(logits, centre, 256, device, "fine-tuned", p.runtime.workers)
    pairs = scores.confusion_pairs(found.argmax(dim=1), labels)
    names = val.manifest["classes"]
    return {
        "metrics": dict(scores.accuracy(found, labels, "finetune")),
        "confusion": [(names[actual], names[predicted]) for actual, predicted in pairs.tolist()],
    }


if __name__ == "__main__":
    with distributed.torchrun():
        run("finetune", main, __doc__, KIND)
