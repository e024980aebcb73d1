"""Transfer to semantic segmentation: UPerNet on the pretrained encoder (the paper's ADE20K column).

The paper's own ADE20K recipe was not released; this is the MAE-style one (512 px crops, 160,000 steps, slide
inference). Costs: demo a quarter of a minute a variant. Expect 52.7 mIoU (paper) for MILAN ViT-B/16 on ADE20K.

Batch norm sees the images of one micro-batch on all GPUs: 2 x 8 as published, so with another number of GPUs set
segment.micro_batch to 16 / GPUs (the run says so). On CPUs it sees one process's micro-batch.
"""

from argparse import Namespace

import torch
from torch import Tensor, nn

from milan.data import seeding, transforms
from milan.data.records import Records
from milan.params import Params
from milan.segmentation import inference, scenes, upernet
from milan.stage import Kind, Stage, run
from milan.training import batch_norm, distributed, optim
from milan.training.device import resolve_params, set_up
from milan.training.loop import FitSettings, fit
from milan.training.resume import SavedState
from milan.training.weights import load_weights, save_weights

KIND = Kind(varies=True, reads=("scenes", "weights"), folders=("out",), files=("metrics", "curve"), evaluates="weights")


class SegmentLoss(nn.Module):
    def __init__(self, model: upernet.Segmenter):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return upernet.segmentation_loss(*self.model(images), labels)


def main(stage: Stage) -> None:
    params, args = stage.params, stage.args
    stage.tracker.reads(Records(args.scenes, "train"), Records(args.scenes, "val"))
    inputs = {"scenes": args.scenes / "manifest.json", "encoder": args.weights / "encoder.safetensors"}
    identity = stage.identify({"segment": params.segment, "model": params.model, "compute": params.compute}, **inputs)
    saved = stage.keep(SavedState(stage.slug, identity, stage.code))
    result = distributed.launch(train, resolve_params(params, stage.tracker), args, saved, stage)
    stage.write_curve(result["curve"])
    stage.write_metrics(result["metrics"], identity)
    stage.tracker.model(args.out, f"segmenter-{args.variant}-{args.seed}")


def train(params: Params, args: Namespace, saved: SavedState, stage: Stage) -> dict:
    device, section = set_up(params.compute), params.segment
    records = Records(args.scenes, "train")
    seeding.seed_globals(args.seed, "segment init")
    model = build(params, len(records.manifest["classes"]), load_weights(args.weights / "encoder.safetensors"), device)
    data = scenes.SceneSamples(records, args.seed, section)
    ids = upernet.encoder_layer_ids(model)
    groups = optim.layer_decay_groups(
        model, section.weight_decay, section.layer_decay, ids.__getitem__, params.model.encoder.depth
    )
    settings = FitSettings(
        stage.title, section, params.compute, params.runtime, args.seed, saved, stage.tracker.point, optim.poly_lr_at
    )
    loss = SegmentLoss(model)
    curve = fit(
        loss,
        data,
        optim.adamw(groups, section.betas),
        settings,
        lambda batch: (transforms.normalise(batch["image"]), batch["label"]),
    )
    if distributed.rank() == 0:
        save_weights(args.out / "segmenter.safetensors", model.state_dict())
    scores = inference.assess(model, Records(args.scenes, "val"), section, params.compute.precision, device)
    return {"curve": curve, "metrics": {f"segment/{name}": value for name, value in scores.items()}}


def build(params: Params, classes: int, encoder: dict[str, Tensor], device: torch.device) -> upernet.Segmenter:
    section, encoder_size = params.segment, params.model.encoder
    norm = "sync" if device.type == "cuda" else "batch"
    if norm == "sync":
        batch_norm.say_what_it_sees("segment", section.batch_size, section.micro_batch)
    model = upernet.Segmenter(
        section.crop_size,
        params.model.patch_size,
        encoder_size.embed_dim,
        encoder_size.depth,
        encoder_size.num_heads,
        classes,
        section.channels,
        section.aux_channels,
        section.out_blocks,
        section.drop_path,
        norm=norm,
    )
    upernet.load_encoder(model, encoder)
    return model.to(device, memory_format=torch.channels_last)  # its convolutions then run a quarter faster


if __name__ == "__main__":
    with distributed.torchrun():
        run("segment", main, __doc__, KIND)
