"""Transfer to semantic segmentation: UPerNet on the pretrained encoder (the paper's ADE20K column).

The paper's own ADE20K recipe was not released; this is the MAE-style one (512 px crops, 160,000 steps, slide
inference). Costs: demo about half a minute a variant. Expect 52.7 mIoU (paper) for MILAN ViT-B/16 on ADE20K.

Batch norm sees the images of one micro-batch on all GPUs: 2 x 8 as published, so with another number of GPUs set
segment.micro_batch to 16 / GPUs (the run says so). On CPUs it sees one process's micro-batch.
"""

from argparse import Namespace

import torch
from torch import Tensor, nn

from milan.core.progress import track
from milan.data import seeding, transforms
from milan.data.records import Records
from milan.params import Params
from milan.segmentation import inference, miou, scenes, upernet
from milan.stage import Kind, Stage, run
from milan.training import distributed, optim
from milan.training.device import autocast, resolve_precision, set_up
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
    p, a = stage.params, stage.args
    stage.tracker.reads(Records(a.scenes, "train"), Records(a.scenes, "val"))
    inputs = {"scenes": a.scenes / "manifest.json", "encoder": a.weights / "encoder.safetensors"}
    identity = stage.identify({"segment": p.segment, "model": p.model, "compute": p.compute}, **inputs)
    saved = stage.keep(SavedState(stage.slug, identity, stage.code))
    result = distributed.launch(train, p, a, saved, stage)
    stage.write_curve(result["curve"])
    stage.write_metrics(result["metrics"], identity)
    stage.tracker.model(a.out, f"segmenter-{a.variant}-{a.seed}")


def train(p: Params, a: Namespace, saved: SavedState, stage: Stage) -> dict:
    device, x = set_up(p.compute), p.segment
    records = Records(a.scenes, "train")
    seeding.seed_globals(a.seed, "segment init")
    model = build(p, len(records.manifest["classes"]), load_weights(a.weights / "encoder.safetensors"), device)
    crop = {
        "crop_size": x.crop_size,
        "resize": x.resize,
        "ratio": x.resize_ratio,
        "max_share": x.max_class_share,
        "photometric": x.photometric,
    }
    data = scenes.SceneSamples(records, a.seed, len(records.manifest["classes"]), **crop)
    ids = upernet.encoder_layer_ids(model)
    groups = optim.layer_decay_groups(model, x.weight_decay, x.layer_decay, ids.__getitem__, p.model.encoder.depth)
    settings = FitSettings(stage.title, x, p.compute, p.runtime, a.seed, saved, stage.tracker.point, optim.poly_lr_at)
    loss = SegmentLoss(model)
    curve = fit(loss, data, optim.adamw(groups, x.betas), settings, lambda b: (transforms.normalise(b["image"]), b["label"]))
    if distributed.rank() == 0:
        save_weights(a.out / "segmenter.safetensors", model.state_dict())
    return {"curve": curve, "metrics": assess(p, model, Records(a.scenes, "val"), device)}


def build(p: Params, classes: int, encoder: dict[str, Tensor], device: torch.device) -> upernet.Segmenter:
    x, e = p.segment, p.model.encoder
    norm = "sync" if device.type == "cuda" else "batch"
    if norm == "sync":
        say_what_batch_norm_sees(x.batch_size, x.micro_batch)
    model = upernet.Segmenter(
        x.crop_size,
        p.model.patch_size,
        e.embed_dim,
        e.depth,
        e.num_heads,
        classes,
        x.channels,
        x.aux_channels,
        x.out_blocks,
        x.drop_path,
        norm=norm,
    )
    upernet.load_encoder(model, encoder)
    return model.to(device, memory_format=torch.channels_last)  # its convolutions are a quarter faster so


def say_what_batch_norm_sees(batch_size: int, micro_batch: int) -> None:
    """On GPUs the one thing besides rounding that depends on the number of processes: as published, all of the batch."""
    world = distributed.world_size()
    if distributed.rank() == 0 and micro_batch * world != batch_size:
        mend = f"-S segment.micro_batch={batch_size // world}" if batch_size % world == 0 else "another number of processes"
        print(
            f"segment: batch norm sees {micro_batch} x {world} images at a time, as published the whole batch of {batch_size}: "
            f"for that, {mend}.",
            flush=True,
        )


def assess(p: Params, model: upernet.Segmenter, val: Records, device: torch.device) -> dict:
    """Slide-window inference at the recipe's scale, compared at the scenes' own size; exact over processes."""
    classes, precision = len(val.manifest["classes"]), resolve_precision(p.compute, device)
    counts = torch.zeros(classes, classes, dtype=torch.int64)
    mine = range(distributed.rank(), len(val), distributed.world_size())
    for index in track(mine, "segmenting", len(mine)) if distributed.rank() == 0 else mine:
        image, labels = scenes.decode_scene(val[index], classes)
        with autocast(precision, device):
            logits = scene_logits(p, model, image.to(device), classes)
        predicted = upernet.resize_maps(logits, labels.shape).argmax(dim=1)[0]
        counts += miou.confusion(predicted.cpu(), labels, classes)
    scores = miou.scores(distributed.total(counts))
    return {f"segment/{name}": value for name, value in scores.items() if name != "class_iou"}


def scene_logits(p: Params, model: upernet.Segmenter, image: Tensor, classes: int) -> Tensor:
    """uint8 (3, H, W) -> logits (1, C, h, w) at the recipe's test scale."""
    resized, _ = scenes.resize_scene(image, None, p.segment.resize, 1.0)
    return inference.slide_logits(
        model, transforms.normalise(resized.unsqueeze(0)), p.segment.crop_size, p.segment.stride, classes
    )


if __name__ == "__main__":
    with distributed.torchrun():
        run("segment", main, __doc__, KIND)
