"""The teacher's targets: V fixed views of every training image (the bank), and what the figures need of a few
validation images (the figure images).

The published recipe is views: 0, a new crop every epoch with the teacher running inside pretraining; a bank trades
disk for the teacher's share of every step, and is shared by all variants and seeds. Features and importance are
those of the release's clip_demo.py.
Costs: demo about 20 s; ImageNet 260 GB a view, teacher speed.
"""

from pathlib import Path

import numpy as np
import torch

from milan.core.files import whole_folder
from milan.core.progress import Progress
from milan.data import transforms
from milan.data.evaluation_view import CentreSamples
from milan.data.records import Records
from milan.method import target_bank
from milan.method.samples import BankViews
from milan.params import Params
from milan.stage import Kind, Stage, run
from milan.teacher.frozen import compute_targets, load_tower
from milan.teacher.towers import Tower
from milan.training import distributed
from milan.training.device import set_up
from milan.training.weights import save_weights

KIND = Kind(reads=("records", "teacher"), folders=("out",), files=("metrics",))


def main(stage: Stage) -> None:
    p, a = stage.params, stage.args
    inputs = {"records": a.records / "manifest.json"}
    inputs["teacher"] = a.teacher / ("teacher.json" if p.no_teacher else "teacher.safetensors")
    sizes = {"image_size": p.model.image_size, "patch_size": p.model.patch_size}
    sections = {"extract_targets": p.extract_targets, "model": sizes, "compute": p.compute}
    identity = stage.identify({**sections, "pretrain.crop_scale": p.pretrain.crop_scale}, **inputs)
    if not p.no_teacher:
        stage.tracker.reads(Records(a.records, "train"), Records(a.records, "val"))
    with whole_folder(a.out, stage.folder_digest(identity)) as folder:
        result = nothing(p, folder) if p.no_teacher else distributed.launch(extract, p, a.records, a.teacher, folder)
    stage.write_metrics(result, identity)


def nothing(p: Params, folder: Path) -> dict:
    """A bank without views and no figure images: a released student is only evaluated."""
    print("pretrain.weights is set: no teacher is needed, and no targets.", flush=True)
    target_bank.finish(folder, views=0, shard_images=p.extract_targets.shard_images, feature_dim=0, images=0)
    return {}


def extract(p: Params, records: Path, teacher: Path, folder: Path) -> dict:
    device, x = set_up(p.compute), p.extract_targets
    tower = load_tower(teacher, p.compute, device)
    train = Records(records, "train")
    if x.views:
        size = target_bank.bank_bytes(len(train), x.views, p.model.n_patches, tower.feature_dim)
        if distributed.rank() == 0:
            target_bank.refuse_when_too_big(folder, size)
        write_bank(p, train, tower, folder, device)
        distributed.barrier()
    if distributed.rank() != 0:
        return {}
    found = write_figure_images(p, Records(records, "val"), tower, folder / "figure_images.safetensors", device)
    target_bank.finish(folder, views=x.views, shard_images=x.shard_images, feature_dim=tower.feature_dim, images=len(train))
    return found


def write_bank(p: Params, train: Records, tower: Tower, folder: Path, device: torch.device) -> None:
    """This process's share of the shards that are not there yet."""
    x = p.extract_targets
    starts = range(0, len(train), x.shard_images)
    # Rank 0 looks for all, before any is written: the shares must be of one list.
    missing = distributed.from_rank_0([number for number in range(len(starts)) if not target_bank.has_shard(folder, number)])
    mine = missing[distributed.rank() :: distributed.world_size()]
    spans = {number: range(starts[number], min(starts[number] + x.shard_images, len(train))) for number in mine}
    progress = Progress("target bank (images)", sum(map(len, spans.values())), shown=distributed.rank() == 0)
    for number, span in spans.items():
        views = BankViews(train, span, x.views, x.seed, p.model.image_size, p.pretrain.crop_scale)
        target_bank.write_shard(folder, number, shard_arrays(p, views, tower, device))
        progress.update(len(span))
    progress.close()


def shard_arrays(p: Params, views: BankViews, tower: Tower, device: torch.device) -> dict[str, np.ndarray]:
    parts: dict[str, list] = {name: [] for name in target_bank.ARRAYS}
    loader = torch.utils.data.DataLoader(views, batch_size=p.extract_targets.batch_size, num_workers=p.runtime.workers)
    for batch in loader:
        images = batch["image"].to(device)
        features, importance = compute_targets(tower, images, p.compute, p.extract_targets.normalisation, p.model.grid)
        parts["features"].append(features.half().cpu().numpy())
        parts["importance"].append(importance.cpu().numpy())
        parts["boxes"].append(batch["box"].numpy())
    return {
        name: np.concatenate(arrays).reshape(len(views.span), views.views, *arrays[0].shape[1:]) for name, arrays in parts.items()
    }


def write_figure_images(p: Params, val: Records, tower: Tower, path: Path, device: torch.device) -> dict:
    """Images, features and importance of a fixed set of validation images; how much importance falls on objects."""
    n = min(p.extract_targets.figure_images, len(val))
    chosen = torch.linspace(0, len(val) - 1, n).long().unique().tolist()
    samples = CentreSamples(val, p.linear_eval.resize, p.model.image_size)
    images = torch.stack([samples[i]["image"] for i in chosen])
    settings = (p.compute, p.extract_targets.normalisation, p.model.grid)
    features, importance = compute_targets(tower, images.to(device), *settings)
    found = {
        "images": images,
        "features": features.half(),
        "importance": importance,
        "index": torch.tensor(chosen),
    }
    save_weights(path, found)
    return {
        "extract_targets/figure_images": len(chosen),
        "extract_targets/perplexity": perplexity(importance),
        **importance_on_objects(p, val, tower, device),
    }


def perplexity(importance: torch.Tensor) -> float:
    """Mean over images of exp(entropy): over how many patches the importance spreads."""
    q = importance / importance.sum(dim=1, keepdim=True)
    return (-(q * q.clamp_min(1e-12).log()).sum(dim=1)).exp().mean().item()


def importance_on_objects(p: Params, val: Records, tower: Tower, device: torch.device) -> dict:
    """object_shares of the validation images whose object's outline is known; empty where none is."""
    if "mask" not in val.table(0).column_names:
        return {}
    known = [i for i, mask in enumerate(val.column("mask")) if mask is not None]
    samples = CentreSamples(val, p.linear_eval.resize, p.model.image_size)
    images = torch.stack([samples[i]["image"] for i in known])
    whole = (transforms.decode_annotation(val[i]["mask"]).unsqueeze(0) for i in known)
    masks = torch.stack([transforms.centre(mask, p.linear_eval.resize, p.model.image_size) for mask in whole])
    cover = torch.nn.functional.adaptive_avg_pool2d((masks > 127).float(), p.model.grid).flatten(1)
    settings = (p.compute, p.extract_targets.normalisation, p.model.grid)
    importance = compute_targets(tower, images.to(device), *settings)[1].cpu()
    return object_shares(importance, cover)


def object_shares(importance: torch.Tensor, cover: torch.Tensor) -> dict[str, float]:
    """Both (images, patches); cover: the object's share of each patch. In %: the importance that falls on the object, the
    object's share of the area (means over images), and the images in which the first share is the larger one."""
    mass, area = (importance * cover).sum(dim=1) / importance.sum(dim=1), cover.mean(dim=1)
    return {
        "extract_targets/importance_on_object": 100 * mass.mean().item(),
        "extract_targets/object_area": 100 * area.mean().item(),
        "extract_targets/importance_above_area": 100 * (mass > area).float().mean().item(),
    }


if __name__ == "__main__":
    with distributed.torchrun():
        run("extract_targets", main, __doc__, KIND)
