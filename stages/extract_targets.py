"""Write the target bank, the teacher's features and importance for V fixed views of every training image, and the figure
images, a few validation images with theirs.

The published recipe is views: 0: a new crop every epoch, and the teacher runs inside pretraining. A bank costs disk and
saves the teacher's part of every step; all variants and seeds share it. Features and importance are computed as in the
release's clip_demo.py.
Costs: demo about ten seconds; ImageNet 260 GB a view, teacher speed.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from milan.core.errors import UserError
from milan.core.files import whole_folder
from milan.core.progress import Progress
from milan.data.evaluation_view import CentreSamples, object_cover
from milan.data.records import Records
from milan.method import target_bank
from milan.method.model import NEAR_ZERO
from milan.method.samples import BankViews
from milan.params import Params
from milan.stage import Kind, Stage, run
from milan.teacher.frozen import compute_targets, load_tower
from milan.teacher.towers import Tower
from milan.training import distributed
from milan.training.device import resolve_params, set_up
from milan.training.weights import save_weights

Targets = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
KIND = Kind(reads=("records", "teacher"), folders=("out",), files=("metrics",))


def main(stage: Stage) -> None:
    params, args = stage.params, stage.args
    inputs = {"records": args.records / "manifest.json"}
    inputs["teacher"] = args.teacher / ("teacher.json" if params.no_teacher else "teacher.safetensors")
    sizes = {"image_size": params.model.image_size, "patch_size": params.model.patch_size}
    sections = {"extract_targets": params.extract_targets, "model": sizes, "compute": params.compute}
    identity = stage.identify({**sections, "pretrain.crop_scale": params.pretrain.crop_scale}, **inputs)
    if not params.no_teacher:
        stage.tracker.reads(Records(args.records, "train"), Records(args.records, "val"))
    with whole_folder(args.out, stage.folder_digest(identity)) as folder:
        result = (
            nothing(params, folder)
            if params.no_teacher
            else distributed.launch(extract, resolve_params(params, stage.tracker), args.records, args.teacher, folder)
        )
    if result:
        doubt_features(stage, result["extract_targets/constant_loss"])
    stage.write_metrics(result, identity)


def doubt_features(stage: Stage, constant_loss: float) -> None:
    """Say so where the teacher's features are nearly constant."""
    if constant_loss < NEAR_ZERO:
        stage.doubt(
            "The teacher's features are nearly the same for all patches of all images: a constant answer has a loss of "
            f"{constant_loss:.2g}. A student's loss near zero then says nothing."
        )


def nothing(params: Params, folder: Path) -> dict:
    """Write a bank without views, and no figure images: a released student is only evaluated."""
    print("pretrain.weights is set: no teacher is needed, and no targets.", flush=True)
    target_bank.finish(folder, views=0, shard_images=params.extract_targets.shard_images, feature_dim=0, images=0)
    return {}


def extract(params: Params, records: Path, teacher: Path, folder: Path) -> dict:
    """Write this process's part of the bank; rank 0 also writes the figure images, first, because they show whether the teacher
    is any use, and closes the bank. Return the metrics."""
    device, section = set_up(params.compute), params.extract_targets
    tower = load_tower(teacher, params.compute, device)
    targets = checked_targets(params, tower, teacher, device)
    train, metrics = Records(records, "train"), {}
    if distributed.rank() == 0:
        metrics = write_figure_images(params, Records(records, "val"), targets, teacher, folder / "figure_images.safetensors")
    if section.views:
        size = target_bank.bank_bytes(len(train), section.views, params.model.n_patches, tower.feature_dim)
        if distributed.rank() == 0:
            target_bank.refuse_when_too_big(folder, size)
        write_bank(params, train, targets, folder)
        distributed.barrier()
    if distributed.rank() == 0:
        target_bank.finish(
            folder, views=section.views, shard_images=section.shard_images, feature_dim=tower.feature_dim, images=len(train)
        )
    return metrics


def checked_targets(params: Params, tower: Tower, teacher: Path, device: torch.device) -> Targets:
    """Return a function from crops, uint8 (B, 3, S, S), to the teacher's features, float16 (B, 1+N, D), and importance (B, N).

    It raises UserError naming the teacher where one of them is not finite, or no patch has importance."""

    def targets(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features, importance = compute_targets(
            tower, images.to(device), params.compute, params.extract_targets.normalisation, params.model.grid
        )
        features = features.half()
        if not features.isfinite().all():
            raise useless(params, teacher, "gives features that are NaN, infinite or above 65504, float16's largest number")
        if not (importance.isfinite().all() and (importance.sum(dim=1) > 0).all()):
            raise useless(params, teacher, "gives an importance that is NaN or infinite, or zero for all patches of an image")
        return features, importance

    return targets


def useless(params: Params, teacher: Path, fault: str) -> UserError:
    released = params.teacher.pretrained
    name = f"{released.model or 'a small CLIP'}, {released.file or released.tag or 'of timm'}" if released else "trained here"
    return UserError(
        f"The teacher in {teacher} ({name}) {fault}: no student can learn from it. "
        + ("Check teacher.pretrained and its file." if released else "Its training failed: lower teacher.lr or train it longer.")
    )


def write_bank(params: Params, train: Records, targets: Targets, folder: Path) -> None:
    """Write this process's share of the missing shards."""
    section = params.extract_targets
    starts = range(0, len(train), section.shard_images)
    # Rank 0 lists them for all before any is written, so that all share out the same list.
    missing = distributed.from_rank_0([number for number in range(len(starts)) if not target_bank.has_shard(folder, number)])
    mine = missing[distributed.rank() :: distributed.world_size()]
    spans = {number: range(starts[number], min(starts[number] + section.shard_images, len(train))) for number in mine}
    progress = Progress("target bank (images)", sum(map(len, spans.values())), shown=distributed.rank() == 0)
    for number, span in spans.items():
        views = BankViews(train, span, section.views, section.seed, params.model.image_size, params.pretrain.crop_scale)
        target_bank.write_shard(folder, number, shard_arrays(params, views, targets))
        progress.update(len(span))
    progress.close()


def shard_arrays(params: Params, views: BankViews, targets: Targets) -> dict[str, np.ndarray]:
    """Return the arrays of one shard, (images, views, ...) each."""
    parts: dict[str, list] = {name: [] for name in target_bank.ARRAYS}
    loader = torch.utils.data.DataLoader(views, batch_size=params.extract_targets.batch_size, num_workers=params.runtime.workers)
    for batch in loader:
        features, importance = targets(batch["image"])
        parts["features"].append(features.cpu().numpy())
        parts["importance"].append(importance.cpu().numpy())
        parts["boxes"].append(batch["box"].numpy())
    return {
        name: np.concatenate(arrays).reshape(len(views.span), views.views, *arrays[0].shape[1:]) for name, arrays in parts.items()
    }


def write_figure_images(params: Params, val: Records, targets: Targets, teacher: Path, path: Path) -> dict:
    """Write images, features and importance of evenly spaced validation images. Return how the importance is spread.

    Raises UserError naming the teacher where its features are the same for all of them."""
    count = min(params.extract_targets.figure_images, len(val))
    chosen = torch.linspace(0, len(val) - 1, count).long().unique().tolist()
    samples = CentreSamples(val, params.linear_eval.resize, params.model.image_size)
    images = torch.stack([samples[i]["image"] for i in chosen])
    features, importance = targets(images)
    if is_constant(features):
        raise useless(params, teacher, f"gives the same features for {len(chosen)} different images")
    save_weights(path, {"images": images, "features": features, "importance": importance, "index": torch.tensor(chosen)})
    return {
        "extract_targets/figure_images": len(chosen),
        "extract_targets/constant_loss": constant_loss(features),
        "extract_targets/perplexity": perplexity(importance),
        **importance_on_objects(params, val, targets),
    }


def is_constant(features: torch.Tensor) -> bool:
    """Return whether features (B, 1+N, D) are the same for all images, up to a thousandth of the largest of them; of a single
    image, whether they are the same for all its tokens."""
    rows = features.float() if len(features) > 1 else features[0].float()
    return bool((rows - rows.mean(dim=0)).abs().max() <= 1e-3 * rows.abs().max())


def constant_loss(features: torch.Tensor) -> float:
    """Return the loss, 2 - 2 cos, of the best constant answer to features (B, 1+N, D): the direction of the mean unit vector."""
    units = torch.nn.functional.normalize(features.double().flatten(0, 1), dim=1)
    return (2 - 2 * units.mean(dim=0).norm()).item()


def perplexity(importance: torch.Tensor) -> float:
    """Return the mean over images of exp(entropy) of importance (images, patches): the number of patches it is spread over."""
    probability = importance / importance.sum(dim=1, keepdim=True)
    return (-(probability * probability.clamp_min(1e-12).log()).sum(dim=1)).exp().mean().item()


def importance_on_objects(params: Params, val: Records, targets: Targets) -> dict:
    """Return object_shares of the validation images that have an object mask; empty where none has."""
    known = [i for i, mask in enumerate(val.column("mask")) if mask is not None]
    if not known:
        return {}
    samples = CentreSamples(val, params.linear_eval.resize, params.model.image_size)
    images = torch.stack([samples[i]["image"] for i in known])
    sizes = (params.linear_eval.resize, params.model.image_size, params.model.grid)
    cover = torch.stack([object_cover(val[i]["mask"], *sizes) for i in known])
    importance = targets(images)[1].cpu()
    return object_shares(importance, cover)


def object_shares(importance: torch.Tensor, cover: torch.Tensor) -> dict[str, float]:
    """Return, in %, the importance on the object and the object's area (means over images), and the share of images in which
    the first is larger. importance, cover: (images, patches); cover is the object's share of each patch."""
    mass, area = (importance * cover).sum(dim=1) / importance.sum(dim=1), cover.mean(dim=1)
    return {
        "extract_targets/importance_on_object": 100 * mass.mean().item(),
        "extract_targets/object_area": 100 * area.mean().item(),
        "extract_targets/importance_above_area": 100 * (mass > area).float().mean().item(),
    }


if __name__ == "__main__":
    with distributed.torchrun():
        run("extract_targets", main, __doc__, KIND)
