"""Masked pretraining of one variant and seed (the paper's method): MILAN, or a row of its ablation.

A variant is a row of pretrain.ablation: its target (pixels or CLIP features), decoder (MAE's or prompting) and masking
(random or semantic aware). `scratch` is a random encoder. With pretrain.weights a released checkpoint takes the place of
training, and only the evaluations run. Paper: section 3; release: main_pretrain.py. With pretrain.monitor_epochs the curve
also holds nearest-neighbour accuracy and RankMe on a small fixed set of images (milan/evaluation/monitor.py).
Costs: demo about a minute a variant; paper 400 epochs, 39 h on 8 A100 as published (the release's README).
"""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch

from milan.convert import interop
from milan.core.identity import Identity
from milan.data import seeding, transforms
from milan.data.records import Records
from milan.evaluation.monitor import Monitor
from milan.method import target_bank
from milan.method.encoder import Encoder
from milan.method.model import NEAR_ZERO, MaskedPretraining
from milan.method.samples import PretrainSamples
from milan.method.target_bank import Bank
from milan.params import Params
from milan.stage import Kind, Stage, run
from milan.training import distributed, optim
from milan.training.device import resolve_params, set_up
from milan.training.foreign import require_file
from milan.training.loop import FitSettings, fit
from milan.training.resume import SavedState
from milan.training.weights import save_weights

KIND = Kind(varies=True, reads=("records", "teacher", "bank"), folders=("out",), files=("metrics", "curve"))


def main(stage: Stage) -> None:
    params, args = stage.params, stage.args
    identity = identify(stage)
    about = {"variant": args.variant, "seed": args.seed, "model": params.model.name}
    if params.pretrain.weights or params.pretrain.ablation[args.variant].target == "none":
        save_weights(args.out / "encoder.safetensors", given_encoder(params, args.seed), **about)
        curve = []
    else:
        stage.tracker.reads(Records(args.records, "train"))
        saved = stage.keep(SavedState(stage.slug, identity, stage.code))
        curve = distributed.launch(train, resolve_params(params, stage.tracker), args, saved, stage, about)["curve"]
    stage.write_curve(curve)
    if curve:
        doubt_loss(stage, curve[-1]["loss"])
    stage.write_metrics({"pretrain/loss": curve[-1]["loss"]} if curve else {}, identity)
    stage.tracker.model(args.out, f"{args.variant}-{args.seed}")


def doubt_loss(stage: Stage, loss: float) -> None:
    """Say so where the loss is near zero."""
    if loss < NEAR_ZERO:
        stage.doubt(
            f"The loss is near zero, {loss:.2g}: the targets are nearly the same everywhere, as those of a teacher that tells nothing "
            "apart, or of flat images. The student had nothing to learn."
        )


def identify(stage: Stage) -> Identity:
    """Return what the encoder depends on: the row of this variant only, and the bank by its content, not by its shards."""
    params, args = stage.params, stage.args
    others = ("ablation", "weights", "monitor_epochs")
    settings = {name: value for name, value in vars(params.pretrain).items() if name not in others}
    row, targets = params.pretrain.ablation[args.variant], params.extract_targets
    sections = {"pretrain": {**settings, "row": row}, "model": params.model, "compute": params.compute}
    sections["extract_targets"] = {"views": targets.views, "normalisation": targets.normalisation}
    inputs = {"records": args.records / "manifest.json"}
    if params.pretrain.weights:
        require_file(inputs.setdefault("weights", Path(params.pretrain.weights)))
    elif row.target == "clip":
        inputs["teacher"] = args.teacher / "teacher.safetensors"
        if targets.views:
            inputs["bank"] = target_bank.content_digest(args.bank)
    return stage.identify(sections, **inputs)


def given_encoder(params: Params, seed: int) -> dict[str, torch.Tensor]:
    """Return the weights of the released checkpoint that the recipe names, or of a random encoder."""
    if params.pretrain.weights:
        return interop.read_encoder(Path(params.pretrain.weights), params.model)
    seeding.seed_globals(seed, "pretrain init")
    return Encoder(params.model).vit.state_dict()


def train(params: Params, args: Namespace, saved: SavedState, stage: Stage, about: dict) -> dict:
    """Pretrain in this process, one of the launch, and write encoder and decoder. Return {"curve": points}."""
    device, row = set_up(params.compute), params.pretrain.ablation[args.variant]
    bank, teacher, width = targets_for(params, args, device)
    seeding.seed_globals(args.seed, "pretrain init")
    model = MaskedPretraining(params.model, row, params.pretrain.mask_ratio, width).to(device)
    samples = PretrainSamples(
        Records(args.records, "train"),
        args.seed,
        params.model.image_size,
        params.model.n_patches,
        params.pretrain.crop_scale,
        bank,
    )
    optimizer = optim.adamw(optim.decay_groups(model, params.pretrain.weight_decay), params.pretrain.betas)
    every = params.pretrain.monitor_epochs
    settings = FitSettings(
        stage.title,
        params.pretrain,
        params.compute,
        params.runtime,
        args.seed,
        saved,
        stage.tracker.point,
        monitor=Monitor(model.encoder, args.records, params, device) if every else None,
        monitor_epochs=every,
    )

    def to_inputs(batch: dict) -> tuple:
        images = transforms.normalise(batch["image"])
        if teacher is None:
            return images, batch["noise"], batch.get("features"), batch.get("importance")
        return images, batch["noise"], *teacher(batch["image"])

    curve = fit(model, samples, optimizer, settings, to_inputs)
    if distributed.rank() == 0:
        save_weights(args.out / "encoder.safetensors", model.encoder.vit.state_dict(), **about)
        save_weights(args.out / "decoder.safetensors", model.decoder.state_dict(), **about)
    return {"curve": curve}


def targets_for(params: Params, args: Namespace, device: torch.device) -> tuple[Bank | None, Callable | None, int | None]:
    """Return (bank, teacher, feature width). The CLIP features come from the bank or, with views: 0, from the teacher at every
    step; for pixel targets all three are None."""
    if params.pretrain.ablation[args.variant].target != "clip":
        return None, None, None
    if params.extract_targets.views:
        bank = Bank(args.bank)
        return bank, None, bank.feature_dim
    from milan.teacher.frozen import compute_targets, load_tower  # here, because open_clip takes seconds to load

    tower = load_tower(args.teacher, params.compute, device)
    if params.compute.compile:
        tower.compile()
    settings = (params.compute, params.extract_targets.normalisation, params.model.grid)
    return None, lambda images: compute_targets(tower, images, *settings), tower.feature_dim


if __name__ == "__main__":
    with distributed.torchrun():
        run("pretrain", main, __doc__, KIND)
