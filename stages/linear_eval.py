"""Linear evaluation (main_linprobe.py of the release): one linear layer on the frozen encoder's class token.

As published: 100 epochs, LARS, a global batch of 16,384, a new crop every epoch (views: 0), an evaluation after every epoch
(eval_epochs: 1): the metrics then hold the best of them beside the last. With views: V the features of V fixed crops are
extracted once and the layer trains on them in memory. With labels: 0.01 layer and nearest neighbours have 1 % of the training
images of each class, the same for every variant and seed; labels.csv lists them. Beside it, what needs no training: nearest
neighbours of the same features, and where the student predicts CLIP features, zero-shot classification by its own
decoder and the teacher's texts of the classes, of whole images and of masked ones (random masks, for every variant).
Costs: demo about ten seconds a variant. Expect 79.9 (paper) or 78.9 (two independent re-runs) for MILAN ViT-B/16 on ImageNet.
"""

import csv
import io
from argparse import Namespace
from collections.abc import Callable

import torch
from torch.utils.data import Dataset, Subset

from milan.core.files import write_whole
from milan.data import seeding
from milan.data.evaluation_view import CentreSamples
from milan.data.records import Records
from milan.evaluation import augmentation, frozen, inference, scores, zero_shot
from milan.evaluation.linear import LinearHead, ProbeLoss
from milan.evaluation.samples import LabelledSamples, balanced_subset, refuse_few_labels
from milan.params import Params
from milan.stage import Kind, Stage, run
from milan.training import distributed, optim
from milan.training.device import resolve_params, set_up
from milan.training.loop import FitSettings, fit
from milan.training.resume import SavedState
from milan.training.weights import save_weights

SUBSET_SEED = 0  # of the images whose labels are used, for every variant and seed
KIND = Kind(
    varies=True, reads=("records", "weights", "teacher"), folders=("out",), files=("metrics", "curve"), evaluates="weights"
)


def main(stage: Stage) -> None:
    params, args, records = stage.params, stage.args, Records(stage.args.records, "train")
    stage.tracker.reads(records, Records(args.records, "val"))
    subset = labels_in_use(params, records)
    sections = {"linear_eval": params.linear_eval, "model": params.model, "compute": params.compute}
    sections["pretrain"] = {"row": params.pretrain.ablation[args.variant], "mask_ratio": params.pretrain.mask_ratio}
    inputs = {path.name: path for path in zero_shot.input_files(args.weights, args.teacher)}
    inputs |= {"records": args.records / "manifest.json", "encoder": args.weights / "encoder.safetensors"}
    identity = stage.identify(sections, **inputs)
    saved = stage.keep(SavedState(stage.slug, identity, stage.code))
    result = distributed.launch(train, resolve_params(params, stage.tracker), args, saved, stage)
    if subset is not None:
        write_whole(args.out / "labels.csv", listing(records, subset))
    stage.write_curve(result["curve"])
    stage.write_metrics(result["metrics"], identity)
    stage.tracker.model(args.out, f"head-{args.variant}-{args.seed}")


def train(params: Params, args: Namespace, saved: SavedState, stage: Stage) -> dict:
    device, section = set_up(params.compute), params.linear_eval
    tokens = frozen.frozen_encoder(params, args.weights, device)

    def encode(images: torch.Tensor) -> torch.Tensor:
        return tokens(images)[:, 0]  # the class token

    records = Records(args.records, "train")
    subset = labels_in_use(params, records)
    seeding.seed_globals(args.seed, "linear_eval init")
    head = LinearHead(params.model.encoder.embed_dim, len(records.classes)).to(device)
    samples, inputs = training_data(params, args.seed, records, subset, encode, device)
    val = Records(args.records, "val")
    features, labels = central_features(params, val, encode, device)

    def evaluate() -> dict[str, float]:
        return dict(scores.accuracy(logits(params, head, features), labels, "val"))

    looks = {"monitor": evaluate, "monitor_epochs": section.eval_epochs}
    settings = FitSettings(stage.title, section, params.compute, params.runtime, args.seed, saved, stage.tracker.point, **looks)
    curve = fit(ProbeLoss(head), samples, optimizer_of(params, head), settings, inputs)
    if distributed.rank() == 0:
        save_weights(args.out / "head.safetensors", head.state_dict())
    labelled = central_features(params, records, encode, device, subset)
    zero_shot_top1 = zero_shot.accuracies(params, args.variant, args.seed, args.weights, args.teacher, val, device)
    metrics = {
        **dict(scores.accuracy(logits(params, head, features), labels, "linear_eval")),
        **dict(scores.best_top1(curve, "linear_eval")),
        "linear_eval/knn_top1": scores.knn_top1(*labelled, features, labels, device),
        **{f"linear_eval/{name}": top for name, top in zero_shot_top1.items()},
    }
    return {"curve": curve, "metrics": metrics}


def labels_in_use(params: Params, records: Records) -> list[int] | None:
    """Return the indices of the training images whose labels are used, in order; None: all. Raises UserError where they are
    too few."""
    share = params.linear_eval.labels
    if share >= 1:
        return None
    labels = records.column("label")
    refuse_few_labels("linear_eval.labels", labels, records.classes, share, params.linear_eval.batch_size)
    return balanced_subset(labels, share, SUBSET_SEED)


def listing(records: Records, subset: list[int]) -> bytes:
    """Return a CSV of index, file and class of the images whose labels are used."""
    names, labels, text = records.column("name"), records.column("label"), io.StringIO()
    rows = [(index, names[index], records.classes[labels[index]]) for index in subset]
    csv.writer(text, lineterminator="\n").writerows([("index", "image", "class"), *rows])
    return text.getvalue().encode()


def training_data(
    params: Params, seed: int, records: Records, subset: list[int] | None, encode: Callable, device: torch.device
) -> tuple[Dataset, Callable]:
    """Return the training set, and the function that turns its batches into (features, labels)."""
    section, size = params.linear_eval, params.model.image_size
    crops = LabelledSamples(records, seed, size, section.crop_scale, augmentation.draw_simple_crop, subset=subset)
    return frozen.training_data(crops, encode, section, device, params.runtime.workers)


def optimizer_of(params: Params, head: LinearHead) -> torch.optim.Optimizer:
    section = params.linear_eval
    if section.optimizer == "lars":
        return optim.lars(head, section.momentum, section.weight_decay)
    return optim.adamw(optim.decay_groups(head, section.weight_decay), (section.momentum, 0.999))


def central_features(
    params: Params, records: Records, encode: Callable, device: torch.device, subset: list[int] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return class-token features (n, D) of the images, or of a subset, in the evaluation view and labels (n,), on the CPU."""
    section = params.linear_eval
    centre = CentreSamples(records, section.resize, params.model.image_size)
    samples = centre if subset is None else Subset(centre, subset)
    return inference.model_outputs(encode, samples, section.micro_batch, device, "features", params.runtime.workers)


@torch.inference_mode()
def logits(params: Params, head: LinearHead, features: torch.Tensor) -> torch.Tensor:
    """Return logits (n, classes) on the CPU."""
    device = head.linear.weight.device
    return torch.cat([head(part.to(device)).cpu() for part in features.split(params.linear_eval.micro_batch)])


if __name__ == "__main__":
    with distributed.torchrun():
        run("linear_eval", main, __doc__, KIND)
