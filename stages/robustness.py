"""Robustness of the fine-tuned classifier and of the linear layer: top-1 on the sets that prepare_robustness packed.

On ImageNet-A and -R the prediction is the best of the set's 200 classes, as their authors score them. ImageNet-C: top-1 and
mCE, the mean over 15 corruptions of the error by AlexNet's; its images, 224 pixels wide, are not resized, as in its authors'
test.py. Images that prepare_robustness corrupted have no AlexNet: their top-1 is averaged over corruptions and strengths.
Costs: demo a few seconds a variant. No result of MILAN is published; MAE ViT-B/16's is in docs/fidelity.md.
"""

from argparse import Namespace

import torch
from torch.utils.data import ConcatDataset

from milan.data.corruptions import parts_of
from milan.data.evaluation_view import CentreSamples
from milan.data.records import Records, read_manifest
from milan.evaluation import frozen, inference, robustness
from milan.evaluation.classifier import load_classifier
from milan.evaluation.linear import LinearHead
from milan.params import Params
from milan.stage import Kind, Stage, run
from milan.training import distributed
from milan.training.device import autocast, resolve_params, set_up
from milan.training.weights import load_into

KIND = Kind(varies=True, reads=("sets", "weights", "linear", "classifier"), files=("metrics",), evaluates="weights")


def main(stage: Stage) -> None:
    params, args = stage.params, stage.args
    sets = read_manifest(args.sets)
    sections = {"robustness": params.robustness, "model": params.model, "compute": params.compute}
    weights = {"encoder": args.weights / "encoder.safetensors", "head": args.linear / "head.safetensors"}
    weights["classifier"] = args.classifier / "classifier.safetensors"
    identity = stage.identify(sections, sets=args.sets / "manifest.json", **weights)
    metrics = {}
    if sets["splits"]:
        metrics = distributed.launch(assess, resolve_params(params, stage.tracker), args)
    else:
        print(f"{args.sets} holds no set, so there is no robustness to measure (data.robustness, docs/data.md).", flush=True)
    stage.write_metrics(metrics, identity)


def assess(params: Params, args: Namespace) -> dict[str, float]:
    device, manifest = set_up(params.compute), read_manifest(args.sets)
    heads = load_heads(params, args, len(manifest["classes"]), device)
    by_set: dict[str, list[str]] = {}
    for split in manifest["splits"]:
        by_set.setdefault(parts_of(split)[0], []).append(split)
    top1 = {split: values for splits in by_set.values() for split, values in top1_of(params, args, splits, heads, device).items()}
    return {
        f"robustness/{head}/{name}": value
        for number, head in enumerate(heads)
        for name, value in robustness.scores({split: values[number] for split, values in top1.items()}, len(manifest["classes"]))
    }


def load_heads(params: Params, args: Namespace, classes: int, device: torch.device) -> dict[str, robustness.Head]:
    """Return the fine-tuned classifier and the linear layer on the frozen encoder."""
    vit, _ = load_classifier(args.classifier)
    vit.to(device).eval()
    tokens = frozen.frozen_encoder(params, args.weights, device)
    linear = LinearHead(params.model.encoder.embed_dim, classes).to(device).eval()
    load_into(linear, args.linear / "head.safetensors")

    def fine_tuned(images: torch.Tensor) -> torch.Tensor:
        with autocast(params.compute.precision, device):
            return vit(images)

    return {"finetune": fine_tuned, "linear": lambda images: linear(tokens(images)[:, 0])}


def top1_of(
    params: Params, args: Namespace, splits: list[str], heads: dict[str, robustness.Head], device: torch.device
) -> dict[str, list[float]]:
    """Return {split: top-1 in % of each head} for the splits of one set."""
    section, size = params.robustness, params.model.image_size
    name, corruption = parts_of(splits[0])
    parts = [Records(args.sets, split) for split in splits]
    views = ConcatDataset([CentreSamples(part, size if corruption else section.resize, size) for part in parts])
    classes = torch.tensor(sorted({label for part in parts for label in part.column("label")}), device=device)

    def predict(images: torch.Tensor) -> torch.Tensor:
        return robustness.predicted_labels(heads, images, classes)

    predicted, labels = inference.model_outputs(predict, views, section.micro_batch, device, name, params.runtime.workers)
    right = (predicted == labels[:, None]).double().split([len(part) for part in parts])
    return {split: (100 * of_split.mean(dim=0)).tolist() for split, of_split in zip(splits, right, strict=True)}


if __name__ == "__main__":
    with distributed.torchrun():
        run("robustness", main, __doc__, KIND)
