"""Print what a recipe costs before it runs: steps, parameters, arithmetic, memory, disk and hours.

    python -m milan.plan                              # the recipe in params.yaml, on the GPU or the CPU of this machine
    python -m milan.plan --scale paper --card H100    # the recipe in conf/scale/paper.yaml, on a card known by name
    python -m milan.plan --scale paper --tflops 250   # the same, on GPUs that sustain 250 TFLOP/s in every stage

Torch counts parameters, arithmetic and activations on the stages' own models with fake tensors, which have shapes but no
values, so nothing is computed or stored. A training takes as long as the slower of its arithmetic and its loaders; evaluation
and start-up are added. Rates of all four are measured ones (benchmarks/RESULTS.md); another card than the H200 is assumed to
sustain the same share of its peak. Of 39 hours of pretraining on 8 A100, which the release reports, this share is 12.6 %; the
same algorithm in plain PyTorch sustained 12.4 % of the H200's peak.
"""

# ruff: noqa: E402  (most of the time saved is that of the imports)
import gc

if __name__ == "__main__":
    gc.disable()  # collections would take a third of the time and find nothing

import argparse
import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from milan.core.errors import UserError
from milan.core.files import explain_os_errors
from milan.core.program import end_at_once, fail
from milan.evaluation.attentive import AttentiveHead
from milan.evaluation.classifier import build_classifier
from milan.ingest.world.drawing import WORLDS
from milan.method.encoder import Encoder
from milan.method.model import MaskedPretraining
from milan.method.target_bank import bank_bytes
from milan.params import (
    AblationRow,
    AttentiveProbe,
    DenseProbe,
    LinearEval,
    Model,
    Params,
    Pretrained,
    Segment,
    TinyClip,
    Training,
    compose_recipe,
    read_params,
)
from milan.report.text import aligned
from milan.segmentation import upernet
from milan.segmentation.dense import DenseHead
from milan.teacher.clip import tiny_config
from milan.teacher.frozen import build_tower
from milan.teacher.released import describe
from milan.teacher.towers import Tower
from milan.tracking.machine import gpu_names

IMAGE_BYTES = 110_000  # mean size of an ImageNet JPEG
SCENE_BYTES = 45_000  # mean size of an ADE20K scene with its annotation
DRAWN_BYTES_PER_PIXEL = 2_500 / 48**2  # in JPEGs of the built-in world
CLASSES = 1000  # of ImageNet
ROBUSTNESS_IMAGES = {  # as published
    "imagenet_a": 7_500,
    "imagenet_r": 30_000,
    "imagenet_sketch": 50_889,
    "imagenet_v2": 10_000,
    "imagenet_c": 19 * 5 * 50_000,
}
VOCABULARY = 20 * 49  # tokens of the built-in captions; hardly changes any count
PHOTO = 500 * 400  # pixels of an image of ImageNet, nearly; benchmarks/loader.py has such images
START = 2.0  # seconds of a stage before and after its work
# Seconds of a small step on a GPU, whose host calls each kernel: six (nine) of demo_gpu's trainings made 106 (36) a second,
# and a linear layer over features that are kept 360.
STEP, SEGMENTER_STEP, HEAD_STEP = 0.01, 0.028, 0.0028
PIXEL = 8.3e-9  # seconds of a worker for a pixel of an image: 6,570 photographs a second by 16 workers
HANDLING = {  # seconds of a worker for an image besides: rates of demo_gpu's stages on an H100 with two workers each
    "pretrain": 0.8e-3,
    "linear_eval": 0.8e-3,
    "attentive_probe": 0.8e-3,  # this and robustness load as the linear evaluation does
    "robustness": 0.8e-3,
    "extract_targets": 0.8e-3,
    "finetune": 1.4e-3,
    "teacher": 1.8e-3,
    "segment": 1.4e-3,  # no more, by the demo's dense probe
    "dense_probe": 1.4e-3,
}


@dataclass(frozen=True)
class Cost:
    """The cost of one image in a training step."""

    parameters: int  # trained ones only
    frozen_flops: float  # forward pass of parts without gradient
    trained_flops: float  # forward pass of trained parts
    activations: int  # bytes kept for the backward pass

    @property
    def step_flops(self) -> float:
        """FLOPs of forward and backward pass; the backward pass costs twice the forward pass of the trained parts."""
        return self.frozen_flops + 3 * self.trained_flops


@dataclass(frozen=True)
class Shares:
    """The share of a device's peak that a stage's arithmetic sustains: of trainings, and of the forward pass of frozen models."""

    pretrain: float
    finetune: float
    segment: float
    frozen: float

    def of(self, stage: str) -> float:
        """Return the share of a stage; teacher and linear layers are nearly all forward passes of a frozen encoder."""
        return getattr(self, stage, self.frozen)


# ViT-B/16 in bfloat16 on an H200, steps of 217, 268 and 264 TFLOP/s and the teacher alone 268; compiled 336, 367, 379 and 416.
EAGER, COMPILED = Shares(0.22, 0.27, 0.27, 0.27), Shares(0.34, 0.37, 0.38, 0.42)
ON_CPU = Shares(0.33, 0.6, 0.54, 0.54)  # the demo's stages in float32 on two cores of an EPYC


@dataclass(frozen=True)
class Device:
    """A device: words for its rate, its peak in FLOP/s, the shares of it that stages sustain, and whether it is a GPU."""

    words: str
    peak: float
    shares: Shares
    gpu: bool = True

    def rate(self, stage: str) -> float:
        """Return the FLOP/s that a stage sustains."""
        return self.peak * self.shares.of(stage)

    def shortest_step(self, stage: str) -> float:
        """Return the seconds that a step takes however small it is."""
        return (SEGMENTER_STEP if stage == "segment" else STEP) if self.gpu else 0.0


CARDS = {  # TFLOP/s of matrix products in bfloat16 without sparsity, by NVIDIA's data sheets (A100 SXM, H100 SXM, RTX 4090)
    "A100": 312.0,
    "H100": 989.0,
    "H200": 989.0,
    "4090": 165.0,
    "CPU": 0.1,  # of a core in float32: 0.07 to 0.12, measured
}


@dataclass(frozen=True)
class StagePlan:
    """One stage of the plan that computes, for all its variants and seeds."""

    name: str
    images: int
    epochs: float
    batch_size: int
    micro_batch: int
    cost: Cost
    runs: int  # number of variants times number of seeds
    pixels: float  # of an image, as it is decoded
    tests: float = 0  # images that the evaluation at the end passes through the model
    windows: float = 0  # windows of scenes that it passes through the model
    loads: float = 0  # images that a run encodes once, to train a linear layer on what it keeps; 0: it keeps nothing

    @property
    def steps(self) -> int:
        """Optimizer steps of one run."""
        return max(1, round(self.epochs * (self.images // self.batch_size)))

    @property
    def flops(self) -> float:
        """FLOPs of all runs."""
        return self.runs * self.steps * self.batch_size * self.cost.step_flops

    def seconds(self, device: Device, workers: int, devices: int = 1) -> float:
        """Return the seconds of all runs, one after the other, each on so many devices with `workers` loader processes each.

        Without workers the process itself loads, which the shares of a CPU's peak include."""
        stage = self.name.split()[0]
        rate, shortest = device.rate(stage), device.shortest_step(stage)
        loading = (HANDLING[stage] + PIXEL * self.pixels) / workers if workers else 0.0
        loads = self.loads or self.steps * self.batch_size
        training = max(self.flops / self.runs / rate, loads * loading, loads / self.batch_size * shortest)
        if self.loads and device.gpu:
            training += self.steps * HEAD_STEP
        forward = (self.cost.frozen_flops + self.cost.trained_flops) / rate
        evaluation = self.tests * max(forward, loading) + self.windows * max(forward, shortest / 3)
        return self.runs * (START + (training + evaluation) / devices)

    @property
    def memory(self) -> float:
        """Bytes on one process: weights, gradients and AdamW's two moments in float32, and a micro-batch's activations."""
        return 16 * self.cost.parameters + self.micro_batch * self.cost.activations


FAKE = FakeTensorMode(allow_non_fake_inputs=True)  # one for all counts, since models that are built once serve several


def build_fake(make: Callable[[], nn.Module]) -> nn.Module:
    """Build a model whose tensors have shapes but no values; to be called under FAKE."""
    with unset_fake_temporarily(), torch.device("meta"):
        model = make()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty(parameter.shape), parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
    return model


def count_pass(forward: Callable[[], Tensor], parameters: list[nn.Parameter]) -> tuple[float, int]:
    """Run a forward pass and return (FLOPs, bytes kept for the backward pass); parameters are not counted as kept."""
    weights = {id(parameter) for parameter in parameters}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if id(tensor) not in weights and id(tensor._base) not in weights:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter, saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return float(counter.get_total_flops()), sum(kept.values())


def training_cost(model: nn.Module, forward: Callable[[], Tensor], images: int, frozen_flops: float = 0.0) -> Cost:
    """Return the cost of training a model, from a forward pass over `images` images.

    frozen_flops: FLOPs for one image of other models, which are not trained."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    flops, kept = count_pass(forward, list(model.parameters()))
    return Cost(sum(parameter.numel() for parameter in trained), frozen_flops, flops / images, kept // images)


def pretrain_cost(params: Params, variant: str) -> Cost | None:
    """Return the cost of pretraining a variant; None when it is not pretrained here."""
    row, size = params.pretrain.ablation[variant], params.model
    if row.target == "none" or params.pretrain.weights:
        return None
    tower = fake_teacher(params)
    model = fake_student(size, row, params.pretrain.mask_ratio, tower.feature_dim)
    images, noise = fake_images(1, size.image_size), torch.randn(1, size.n_patches)
    features, importance = torch.randn(1, 1 + size.n_patches, tower.feature_dim), torch.rand(1, size.n_patches)
    online = row.target == "clip" and not params.extract_targets.views
    frozen_flops = teacher_flops(tower) if online else 0.0
    return training_cost(model, lambda: model(images, noise, features, importance), 1, frozen_flops)


def component_flops(params: Params) -> dict[str, float]:
    """Return FLOPs of a forward pass for one image: teacher, encoder (visible patches only) and decoder of MILAN."""
    size, tower = params.model, fake_teacher(params)
    model = fake_student(size, milan_row(params), params.pretrain.mask_ratio, tower.feature_dim)
    images, visible = fake_images(1, size.image_size), torch.arange(model.n_visible)[None]
    masked = torch.arange(model.n_visible, size.n_patches)[None]
    latent = torch.randn(1, 1 + model.n_visible, size.encoder.embed_dim)
    return {
        "teacher": teacher_flops(tower),
        "encoder": forward_flops(model.encoder, images, visible),
        "decoder": forward_flops(model.decoder, latent, visible, masked),
    }


def forward_flops(model: nn.Module, *inputs: Tensor) -> float:
    """Count the FLOPs of a forward pass."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    return float(counter.get_total_flops())


@functools.cache
def teacher_flops(tower: Tower) -> float:
    """Count the FLOPs of the teacher's forward pass for one image."""
    return forward_flops(tower, fake_images(1, tower.size))


def fake_teacher(params: Params) -> Tower:
    """Return the teacher without values."""
    return fake_tower(params.teacher.tiny, params.teacher.pretrained, params.model)


@functools.cache
def fake_tower(tiny: TinyClip | None, pretrained: Pretrained | None, model: Model) -> Tower:
    with unset_fake_temporarily():
        config = tiny_config(tiny, model, list(range(VOCABULARY)), None) if tiny else describe(pretrained)
    return build_fake(lambda: build_tower(config))


@functools.cache
def fake_student(size: Model, row: AblationRow, mask_ratio: float, feature_dim: int) -> MaskedPretraining:
    """Return the model of pretraining without values."""
    return build_fake(lambda: MaskedPretraining(size, row, mask_ratio, feature_dim))


def fake_images(count: int, size: int) -> Tensor:
    """Return images (count, 3, size, size); without values under FakeTensorMode."""
    return torch.randn(count, 3, size, size)


def linear_cost(params: Params) -> Cost:
    """Return the cost of linear evaluation, nearly all of it the frozen encoder's forward pass."""
    width = params.model.encoder.embed_dim
    return Cost(width * CLASSES, frozen_flops(params.model, params.linear_eval), 2.0 * width * CLASSES, 4 * width)


def attentive_cost(params: Params) -> Cost:
    """Return the cost of the attentive probe: the frozen encoder's forward pass, and a block's work on keys and values."""
    encoder = params.model.encoder
    head = build_fake(lambda: AttentiveHead(encoder.embed_dim, encoder.num_heads, CLASSES))
    tokens = torch.randn(2, 1 + params.model.n_patches, encoder.embed_dim)
    return training_cost(head, lambda: head(tokens), 2, frozen_flops(params.model, params.attentive_probe))


def frozen_flops(model: Model, settings: LinearEval | AttentiveProbe | DenseProbe) -> float:
    """Count the FLOPs of the frozen encoder for one image of a step; fixed views are encoded once."""
    return encoder_flops(model) * (1.0 if settings.views == 0 else min(1.0, settings.views / settings.epochs))


@functools.cache
def encoder_flops(model: Model) -> float:
    """Count the FLOPs of the encoder's forward pass for one whole image."""
    return forward_flops(build_fake(lambda: Encoder(model)), fake_images(1, model.image_size))


def finetune_cost(params: Params) -> Cost:
    """Return the cost of fine-tuning with ImageNet's classes."""
    model, images = params.model, fake_images(2, params.model.image_size)
    vit = build_fake(lambda: build_classifier(model, params.finetune, CLASSES, Encoder(model).vit.state_dict())).train()
    return training_cost(vit, lambda: vit(images), 2)


def segment_cost(params: Params) -> Cost:
    """Return the cost of training the segmenter."""
    settings, encoder = params.segment, params.model.encoder
    sizes = (settings.crop_size, params.model.patch_size, encoder.embed_dim, encoder.depth, encoder.num_heads)
    heads = (params.prepare_ade20k.classes, settings.channels, settings.aux_channels, settings.out_blocks)
    model = build_fake(lambda: upernet.Segmenter(*sizes, *heads, norm="batch")).train()
    images = fake_images(2, settings.crop_size)
    return training_cost(model, lambda: model(images), 2)


def dense_cost(params: Params) -> Cost:
    """Return the cost of the dense probe, nearly all of it the frozen encoder's forward pass."""
    settings, width = params.dense_probe, params.model.encoder.embed_dim
    of_crop = dataclasses.replace(params.model, image_size=settings.crop_size)
    head = build_fake(lambda: DenseHead(width, params.prepare_ade20k.classes, "batch")).train()
    features = torch.randn(2, width, of_crop.grid, of_crop.grid)
    return training_cost(head, lambda: head(features), 2, frozen_flops(of_crop, settings))


def robustness_images(params: Params) -> int:
    """Return the images of the robustness sets, as published, and of the corrupted validation images."""
    given = {name for name, path in vars(params.data.robustness).items() if path}
    images = sum(ROBUSTNESS_IMAGES[name] for name in given)
    if "imagenet_c" in given:
        return images
    classes = CLASSES if params.data.imagenet else len(WORLDS[params.prepare_imagenet.world].classes)
    return images + 25 * classes * params.prepare_robustness.images


def robustness_cost(params: Params) -> Cost:
    """Return the cost of an image: forward passes of the classifier and of the frozen encoder, which are of one size."""
    return Cost(0, 2 * encoder_flops(params.model), 0.0, 0)


def scene_windows(params: Params, section: Segment | DenseProbe) -> float:
    """Return the windows of the evaluation's scenes, which are taken for 4:3, at all scales, mirrored where the recipe says so."""
    count = 0
    for scale in section.scales:
        sides = [max(section.crop_size, scale * section.resize[1] * ratio) for ratio in (1, 4 / 3)]
        rows, columns = (1 + math.ceil((side - section.crop_size) / section.stride) for side in sides)
        count += rows * columns
    return params.prepare_ade20k.val * count * (2 if section.flip else 1)


def stage_plans(params: Params) -> list[StagePlan]:
    """Return the plan of every stage that computes; pretraining has one for each variant, robustness where it is measured."""
    imagenet, scenes, seeds = params.prepare_imagenet, params.prepare_ade20k, len(params.seeds)
    pixels = PHOTO if params.data.imagenet or not imagenet.size else imagenet.size**2
    scene_pixels = PHOTO if params.data.ade20k or not scenes.size else scenes.size**2
    runs, costs = seeds * len(params.variants), {}

    def stage_plan(name: str, images: int, training: Training, cost: Cost, runs: int, pixels: float = pixels, **more) -> StagePlan:
        sizes = (training.epochs, training.batch_size, training.micro_batch)
        return StagePlan(name, images, *sizes, cost, runs, pixels, **more)

    def once(row: AblationRow, variant: str) -> Cost | None:  # rows that differ in their masking cost the same
        key = (row.target, row.decoder)
        return costs[key] if key in costs else costs.setdefault(key, pretrain_cost(params, variant))

    linear, attentive, dense, finetune, segment = (
        getattr(params, name) for name in ("linear_eval", "attentive_probe", "dense_probe", "finetune", "segment")
    )
    labelled, shifted, at_a_time = round(imagenet.train * linear.labels), robustness_images(params), params.robustness.micro_batch
    scene_cost, on_scenes = segment_cost(params), {"pixels": scene_pixels}
    return [
        *teacher_plans(params, pixels),
        *(
            stage_plan(f"pretrain {variant}", imagenet.train, params.pretrain, cost, seeds)
            for variant in params.variants
            if (cost := once(params.pretrain.ablation[variant], variant))
        ),
        stage_plan("linear_eval", labelled, linear, linear_cost(params), runs, tests=imagenet.val, loads=labelled * linear.views),
        stage_plan("attentive_probe", imagenet.train, attentive, attentive_cost(params), runs, tests=imagenet.val,
                   loads=imagenet.train * attentive.views),
        stage_plan("finetune", round(imagenet.train * finetune.labels), finetune, finetune_cost(params), runs, tests=imagenet.val),
        stage_plan("segment", scenes.train, segment, scene_cost, runs, windows=scene_windows(params, segment), **on_scenes),
        stage_plan("dense_probe", scenes.train, dense, dense_cost(params), runs, windows=scene_windows(params, dense),
                   loads=scenes.train * dense.views, **on_scenes),
        *([StagePlan("robustness", shifted, 1, at_a_time, at_a_time, robustness_cost(params), runs, pixels)] if shifted else []),
    ]  # fmt: skip


def teacher_plans(params: Params, pixels: float) -> list[StagePlan]:
    """Return the plans of a teacher that is trained here, whose text tower is left out, and of the target bank."""
    imagenet, settings, views = params.prepare_imagenet, params.teacher, params.extract_targets.views
    tower = fake_teacher(params)
    flops = teacher_flops(tower)
    trained = Cost(sum(parameter.numel() for parameter in tower.parameters()), 0.0, flops, 0)
    batch = params.extract_targets.batch_size
    plans = []
    if settings.tiny:
        pairs = imagenet.pairs or imagenet.train
        sizes = (settings.epochs, settings.batch_size, settings.micro_batch)
        plans.append(StagePlan("teacher", pairs, *sizes, trained, 1, pixels))
    if views and any(params.pretrain.ablation[variant].target == "clip" for variant in params.variants):
        frozen = Cost(0, flops, 0.0, 0)
        plans.append(StagePlan("extract_targets", imagenet.train, views, batch, batch, frozen, 1, pixels))
    return plans


def record_bytes(folder: str | None, size: int | None, real: int) -> float:
    """Return the mean size of a record: `real` for images from a folder, else that of a drawn picture of this side."""
    return real if folder or not size else DRAWN_BYTES_PER_PIXEL * size**2


def disk_bytes(params: Params) -> dict[str, float]:
    """Return the bytes of what the pipeline keeps on disk."""
    imagenet, ade20k = params.prepare_imagenet, params.prepare_ade20k
    image = record_bytes(params.data.imagenet, imagenet.size, IMAGE_BYTES)
    scene = record_bytes(params.data.ade20k, ade20k.size, SCENE_BYTES)
    width = fake_teacher(params).feature_dim
    model = fake_student(params.model, milan_row(params), params.pretrain.mask_ratio, width)
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    return {
        "records": (imagenet.train + imagenet.val + imagenet.pairs) * image + (ade20k.train + ade20k.val) * scene,
        "target bank": bank_bytes(imagenet.train, params.extract_targets.views, params.model.n_patches, width),
        "weights, a variant and seed": weights,
        "a save to resume from (two are kept)": 3 * weights,
    }


def milan_row(params: Params) -> AblationRow:
    """Return the recipe's row for MILAN, else its first row that pretrains, else the paper's row."""
    rows = [params.pretrain.ablation.get("milan"), *params.pretrain.ablation.values()]
    return next((row for row in rows if row and row.target != "none"), AblationRow("clip", "prompt", "semantic"))


def device_named(name: str | None, params: Params) -> Device:
    """Return a card of CARDS; None: the GPU of this machine, or its CPU. Raises UserError for a card that is not known."""
    gpus = gpu_names() if name is None and params.compute.device != "cpu" else []
    wanted = name or (gpus[0] if gpus else "CPU")
    card = next((card for card in CARDS if card.casefold() in wanted.casefold()), None)
    if card is None:
        raise UserError(f"No figures are known for {wanted!r}, only for {', '.join(CARDS)}: say with --tflops what it sustains.")
    if card == "CPU":
        threads = params.compute.threads
        return Device(f"on a CPU, {threads} core(s) a process", CARDS[card] * 1e12 * threads, ON_CPU, gpu=False)
    shares = COMPILED if params.compute.compile else EAGER
    low, high = min(vars(shares).values()), max(vars(shares).values())
    words = f"on {card} at {100 * low:.0f} to {100 * high:.0f} % of its {CARDS[card]:.0f} TFLOP/s"
    return Device(words, CARDS[card] * 1e12, shares)


def format_plan(params: Params, device: Device) -> str:
    """Return the whole plan as text, for one and for eight devices of this kind."""
    with FAKE:
        stages, components, kept = stage_plans(params), component_flops(params), disk_bytes(params)
    head = ["stage", "runs", "images", "epochs", "steps", "M parameters", "GFLOP/image", "GB/process", "hours on 1", "hours on 8"]
    rows, totals = [head], [0.0, 0.0]
    for stage in stages:
        counts = [f"{stage.runs}", f"{stage.images:,}", f"{stage.epochs:.4g}", f"{stage.steps:,}"]
        costs = [f"{stage.cost.parameters / 1e6:.1f}", f"{stage.cost.step_flops / 1e9:.4g}", f"{stage.memory / 1e9:.3g}"]
        hours = [stage.seconds(device, params.runtime.workers, devices) / 3600 for devices in (1, 8)]
        totals = [total + more for total, more in zip(totals, hours, strict=True)]
        rows.append([stage.name, *counts, *costs, *(f"{number:.3g}" for number in hours)])
    rows.append(["all", *[""] * (len(head) - 3), *(f"{total:.3g}" for total in totals)])
    forward = ", ".join(f"{name} {value / 1e9:.4g}" for name, value in components.items())
    return "\n".join([
        f"recipe {params.scale}, {params.model.name} at {params.model.image_size} px, {device.words}",
        "", aligned(rows, left=1), "",
        f"GFLOP of an image, forward: {forward}. A step is the teacher's forward pass and three of the student's.",
        "GB/process: weights, gradients, AdamW's moments and the activations of a micro-batch, in float32; "
        "bf16 keeps about half of the activations.",
        f"Hours are start-up, evaluation, and the slower of arithmetic and loading by {params.runtime.workers} worker(s) a device, "
        "stage after stage.",
        "disk: " + ", ".join(f"{name} {size / 1e9:,.3g} GB" for name, size in kept.items()) + ".",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="the recipe (default: %(default)s)")
    parser.add_argument("--scale", help="the recipe of this name in conf/scale instead")
    parser.add_argument("--card", help=f"the device: {', '.join(CARDS)} (default: what is in this machine)")
    parser.add_argument("--tflops", type=float, help="TFLOP/s that one device sustains in every stage, instead of --card")
    args = parser.parse_args()
    try:
        with explain_os_errors():
            params = read_params(args.params) if args.scale is None else compose_recipe(args.scale)
            if args.tflops is not None and not 0 < args.tflops * 1e12 < float("inf"):
                raise UserError(f"--tflops {args.tflops} must be a number above 0.")
            if args.tflops:
                device = Device(f"if a device sustains {args.tflops:g} TFLOP/s", args.tflops * 1e12, Shares(1, 1, 1, 1))
            else:
                device = device_named(args.card, params)
            print(format_plan(params, device))
    except UserError as error:
        fail(str(error))


if __name__ == "__main__":
    main()
    end_at_once()
