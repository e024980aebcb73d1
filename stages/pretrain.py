"""Masked pretraining of one variant and seed (the paper's method): MILAN, or a row of its ablation.

A variant is a row of pretrain.ablation: which target (pixels, CLIP features), which decoder (MAE's, prompting) and
which masking (random, semantic aware). `scratch` is a random encoder. With pretrain.weights a released checkpoint
takes the place of training, and only the evaluations run.
Costs: demo about a minute a variant; paper 400 epochs, 39 h on 8 A100 as published.
"""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch

from milan.convert import interop
from milan.core.identity import Identity
from milan.data import seeding, transforms
from milan.data.records import Records
from milan.method import target_bank
from milan.method.encoder import Encoder
from milan.method.model import MaskedPretraining
from milan.method.samples import PretrainSamples
from milan.method.target_bank import Bank
from milan.params import Params
from milan.stage import Kind, Stage, run
from milan.training import distributed, optim
from milan.training.device import set_up
from milan.training.foreign import require_file
from milan.training.loop import FitSettings, fit
from milan.training.resume import SavedState
from milan.training.weights import save_weights

KIND = Kind(varies=True, reads=("records", "teacher", "bank"), folders=("out",), files=("metrics", "curve"))


def main(stage: Stage) -> None:
    p, a = stage.params, stage.args
    identity = identify(stage)
    about = {"variant": a.variant, "seed": a.seed, "model": p.model.name}
    if p.pretrain.weights or p.pretrain.ablation[a.variant].target == "none":
        save_weights(a.out / "encoder.safetensors", given_encoder(p, a.seed), **about)
        curve = []
    else:
        stage.tracker.reads(Records(a.records, "train"))
        saved = stage.keep(SavedState(stage.slug, identity, stage.code))
        curve = distributed.launch(train, p, a, saved, stage, about)["curve"]
    stage.write_curve(curve)
    stage.write_metrics({"pretrain/loss": curve[-1]["loss"]} if curve else {}, identity)
    stage.tracker.model(a.out, f"{a.variant}-{a.seed}")


def identify(stage: Stage) -> Identity:
    """Return what the encoder follows from: this variant's row and not the others, the bank's content and not how it is cut
    into shards."""
    params, args = stage.params, stage.args
    settings = {name: value for name, value in vars(params.pretrain).items() if name not in ("ablation", "weights")}
    row, targets = params.pretrain.ablation[args.variant], params.extract_targets
    sections = {"pretrain": {**settings, "row": row}, "model": params.model, "compute": params.compute}
    sections["extract_targets"] = {"views": targets.views, "normalisation": targets.normalisation}
    inputs = {"records": args.records / "manifest.json"}
    if params.pretrain.weights:
        require_file(inputs.setdefault("weights", Path(params.pretrain.weights)))
    elif row.target == "clip":
        inputs |= {"teacher": args.teacher / "teacher.safetensors", "bank": target_bank.content_digest(args.bank)}
    return stage.identify(sections, **inputs)


def given_encoder(p: Params, seed: int) -> dict[str, torch.Tensor]:
    """A released encoder, or a random one."""
    if p.pretrain.weights:
        return interop.read_encoder(Path(p.pretrain.weights), p.model)
    seeding.seed_globals(seed, "pretrain init")
    return Encoder(p.model).vit.state_dict()


def train(p: Params, a: Namespace, saved: SavedState, stage: Stage, about: dict) -> dict:
    device, row = set_up(p.compute), p.pretrain.ablation[a.variant]
    bank, teacher, width = targets_for(p, a, device)
    seeding.seed_globals(a.seed, "pretrain init")
    model = MaskedPretraining(p.model, row, p.pretrain.mask_ratio, width).to(device)
    samples = PretrainSamples(
        Records(a.records, "train"), a.seed, p.model.image_size, p.model.n_patches, p.pretrain.crop_scale, bank
    )
    optimizer = optim.adamw(optim.decay_groups(model, p.pretrain.weight_decay), p.pretrain.betas)
    settings = FitSettings(stage.title, p.pretrain, p.compute, p.runtime, a.seed, saved, stage.tracker.point)

    def to_inputs(batch: dict) -> tuple:
        images = transforms.normalise(batch["image"])
        if teacher is None:
            return images, batch["noise"], batch.get("features"), batch.get("importance")
        return images, batch["noise"], *teacher(batch["image"])

    curve = fit(model, samples, optimizer, settings, to_inputs)
    if distributed.rank() == 0:
        save_weights(a.out / "encoder.safetensors", model.encoder.vit.state_dict(), **about)
        save_weights(a.out / "decoder.safetensors", model.decoder.state_dict(), **about)
    return {"curve": curve}


def targets_for(p: Params, a: Namespace, device: torch.device) -> tuple[Bank | None, Callable | None, int | None]:
    """Where CLIP features come from, and their width: the bank, the teacher asked at every step, or nowhere (pixel targets)."""
    if p.pretrain.ablation[a.variant].target != "clip":
        return None, None, None
    if p.extract_targets.views:
        bank = Bank(a.bank)
        return bank, None, bank.feature_dim
    from milan.teacher.frozen import compute_targets, load_tower  # here, because open_clip takes seconds to load

    tower = load_tower(a.teacher, p.compute, device)
    settings = (p.compute, p.extract_targets.normalisation, p.model.grid)
    return None, lambda images: compute_targets(tower, images, *settings), tower.feature_dim


if __name__ == "__main__":
    with distributed.torchrun():
        run("pretrain", main, __doc__, KIND)
