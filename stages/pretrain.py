"""Masked pretraining of one variant and seed (the paper's method): MILAN, or a row of its ablation.

A variant is a row of pretrain.recipes: which target (pixels, CLIP features), which decoder (MAE's, prompting) and
which masking (random, semantic aware). `scratch` is a random encoder. With pretrain.weights a released checkpoint
takes the place of training, and only the evaluations run.
Costs: demo about a minute a variant; paper 400 epochs, 39 h on 8 A100 as published.
"""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch

from milan import distributed, interop, optim, rng, transforms
from milan.checkpoint import Scratch, save_weights
from milan.encoder import Encoder
from milan.fit import Run, fit
from milan.model import MaskedPretraining
from milan.params import Params
from milan.records import Records
from milan.samples import PretrainSamples
from milan.stage import Stage, run
from milan.targets import Bank


def main(stage: Stage) -> None:
    p, a = stage.params, stage.args
    recipe = stage.fingerprint(p.pretrain, p.model, p.compute, p.extract_targets, inputs=inputs(p, a))
    scratch = Scratch(f"pretrain-{a.variant}-{a.seed}", recipe)
    about = {"fingerprint": recipe, "variant": a.variant, "seed": a.seed, "model": p.model.name}
    if p.pretrain.weights or p.pretrain.recipes[a.variant].target == "none":
        save_weights(a.out / "encoder.safetensors", given_encoder(p, a.seed), **about)
        curve = []
    else:
        stage.tracker.reads(Records(a.records, "train"))
        curve = distributed.launch(train, p, a, scratch, stage, about)["curve"]
    stage.write_curve(curve)
    stage.write_metrics({"pretrain/loss": curve[-1]["loss"]} if curve else {}, recipe)
    stage.tracker.model(a.out, f"{a.variant}-{a.seed}")
    scratch.clean()


def inputs(p: Params, a: Namespace) -> list[Path]:
    """The files that the result follows from."""
    given = [Path(p.pretrain.weights)] if p.pretrain.weights and Path(p.pretrain.weights).is_file() else []
    teacher = a.teacher / ("teacher.json" if p.no_teacher else "teacher.safetensors")
    return [a.records / "manifest.json", teacher, a.bank / "bank.json", *given]


def given_encoder(p: Params, seed: int) -> dict[str, torch.Tensor]:
    """A released encoder, or a random one."""
    if p.pretrain.weights:
        return interop.read_encoder(Path(p.pretrain.weights), p.model)
    rng.seed_globals(seed, "pretrain init")
    return Encoder(p.model).vit.state_dict()


def train(p: Params, a: Namespace, scratch: Scratch, stage: Stage, about: dict) -> dict:
    device, row = distributed.set_up(p.compute), p.pretrain.recipes[a.variant]
    bank, teacher, width = targets_for(p, a, device)
    rng.seed_globals(a.seed, "pretrain init")
    model = MaskedPretraining(p.model, row, p.pretrain.mask_ratio, width).to(device)
    samples = PretrainSamples(
        Records(a.records, "train"), a.seed, p.model.image_size, p.model.n_patches, p.pretrain.crop_scale, bank
    )
    optimizer = optim.adamw(optim.decay_groups(model, p.pretrain.weight_decay), p.pretrain.betas)
    settings = Run(stage.title, p.pretrain, p.compute, p.runtime, a.seed, scratch, stage.tracker.point)

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
    if p.pretrain.recipes[a.variant].target != "clip":
        return None, None, None
    if p.extract_targets.views:
        bank = Bank(a.bank)
        return bank, None, bank.feature_dim
    from milan.teachers import load_tower, look  # here, because open_clip takes seconds to load

    tower = load_tower(a.teacher, p.compute, device)
    if p.compute.compile:
        tower.compile()
    return None, lambda images: look(tower, images, p.compute, p.extract_targets.normalisation, p.model.grid), tower.feature_dim


if __name__ == "__main__":
    run(
        "pretrain",
        main,
        __doc__,
        variant=str,
        seed=int,
        records=Path,
        teacher=Path,
        bank=Path,
        out=Path,
        metrics=Path,
        curve=Path,
    )
