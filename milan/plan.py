"""Print what a recipe costs before it runs: steps, parameters, arithmetic, memory, disk and hours.

    python -m milan.plan                              # the recipe in params.yaml
    python -m milan.plan --scale paper --tflops 250   # the recipe in conf/scale/paper.yaml, on GPUs that sustain 250 TFLOP/s

Torch counts parameters, arithmetic and activations on the stages' own models with fake tensors, which have shapes but no
values, so nothing is computed or stored. Hours are the arithmetic divided by the rate that a device sustains, which
benchmarks/step.py measures; without --tflops, half the rate of a large matrix product on this machine is assumed.
"""

import argparse
import dataclasses
import time
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
from milan.core.program import fail
from milan.evaluation.attentive import AttentiveHead
from milan.evaluation.classifier import build_classifier
from milan.ingest.world.drawing import WORLDS
from milan.method.encoder import Encoder
from milan.method.model import MaskedPretraining
from milan.method.target_bank import bank_bytes
from milan.params import AblationRow, AttentiveProbe, DenseProbe, LinearEval, Model, Params, Training, compose_recipe, read_params
from milan.report.text import aligned
from milan.segmentation import upernet
from milan.segmentation.dense import DenseHead
from milan.teacher.clip import tiny_config
from milan.teacher.frozen import build_tower
from milan.teacher.released import describe
from milan.teacher.towers import Tower
from milan.training.device import DTYPES, resolve_compute, resolve_device

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
class StagePlan:
    """One training stage of the plan, for all its variants and seeds."""

    name: str
    images: int
    epochs: float
    batch_size: int
    micro_batch: int
    cost: Cost
    runs: int  # number of variants times number of seeds

    @property
    def steps(self) -> int:
        """Optimizer steps of one run."""
        return max(1, round(self.epochs * (self.images // self.batch_size)))

    @property
    def flops(self) -> float:
        """FLOPs of all runs."""
        return self.runs * self.steps * self.batch_size * self.cost.step_flops

    @property
    def memory(self) -> float:
        """Bytes on one process: weights, gradients and AdamW's two moments in float32, and a micro-batch's activations."""
        return 16 * self.cost.parameters + self.micro_batch * self.cost.activations


def build_fake(make: Callable[[], nn.Module]) -> nn.Module:
    """Build a model whose tensors have shapes but no values; to be called under FakeTensorMode."""
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
    row, model_size = params.pretrain.ablation[variant], params.model
    if row.target == "none" or params.pretrain.weights:
        return None
    tower = fake_teacher(params)
    model = build_fake(lambda: MaskedPretraining(model_size, row, params.pretrain.mask_ratio, tower.feature_dim))
    n_patches = model_size.n_patches
    images, noise = fake_images(1, model_size.image_size), torch.randn(1, n_patches)
    features, importance = torch.randn(1, 1 + n_patches, tower.feature_dim), torch.rand(1, n_patches)
    online = row.target == "clip" and not params.extract_targets.views
    frozen_flops = forward_flops(tower, fake_images(1, tower.size)) if online else 0.0
    return training_cost(model, lambda: model(images, noise, features, importance), 1, frozen_flops)


def component_flops(params: Params) -> dict[str, float]:
    """Return FLOPs of a forward pass for one image: teacher, encoder (visible patches only) and decoder of MILAN."""
    size, tower = params.model, fake_teacher(params)
    model = build_fake(lambda: MaskedPretraining(size, milan_row(params), params.pretrain.mask_ratio, tower.feature_dim))
    images, visible = fake_images(1, size.image_size), torch.arange(model.n_visible)[None]
    masked = torch.arange(model.n_visible, size.n_patches)[None]
    latent = torch.randn(1, 1 + model.n_visible, size.encoder.embed_dim)
    return {
        "teacher": forward_flops(tower, fake_images(1, tower.size)),
        "encoder": forward_flops(model.encoder, images, visible),
        "decoder": forward_flops(model.decoder, latent, visible, masked),
    }


def forward_flops(model: nn.Module, *inputs: Tensor) -> float:
    """Count the FLOPs of a forward pass."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    return float(counter.get_total_flops())


def fake_teacher(params: Params) -> Tower:
    """Build the teacher without values."""
    tiny, pretrained = params.teacher.tiny, params.teacher.pretrained
    with unset_fake_temporarily():
        config = tiny_config(tiny, params.model, list(range(VOCABULARY)), None) if tiny else describe(pretrained)
    return build_fake(lambda: build_tower(config))


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
    encoder_flops = forward_flops(build_fake(lambda: Encoder(model)), fake_images(1, model.image_size))
    return encoder_flops * (1.0 if settings.views == 0 else min(1.0, settings.views / settings.epochs))


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
    encoder_flops = forward_flops(build_fake(lambda: Encoder(params.model)), fake_images(1, params.model.image_size))
    return Cost(0, 2 * encoder_flops, 0.0, 0)


def stage_plans(params: Params) -> list[StagePlan]:
    """Return the plan of every training stage, pretraining for each variant, and of robustness where it is measured."""
    train, scenes, seeds = params.prepare_imagenet.train, params.prepare_ade20k.train, len(params.seeds)

    def stage_plan(name: str, images: int, training: Training, cost: Cost, runs: int) -> StagePlan:
        return StagePlan(name, images, training.epochs, training.batch_size, training.micro_batch, cost, runs)

    pretraining = [
        stage_plan(f"pretrain {variant}", train, params.pretrain, cost, seeds)
        for variant in params.variants
        if (cost := pretrain_cost(params, variant))
    ]
    runs, shifted, micro_batch = seeds * len(params.variants), robustness_images(params), params.robustness.micro_batch
    robustness = [StagePlan("robustness", shifted, 1, micro_batch, micro_batch, robustness_cost(params), runs)] if shifted else []
    return [
        *pretraining,
        stage_plan("linear_eval", round(train * params.linear_eval.labels), params.linear_eval, linear_cost(params), runs),
        stage_plan("attentive_probe", train, params.attentive_probe, attentive_cost(params), runs),
        stage_plan("finetune", round(train * params.finetune.labels), params.finetune, finetune_cost(params), runs),
        stage_plan("segment", scenes, params.segment, segment_cost(params), runs),
        stage_plan("dense_probe", scenes, params.dense_probe, dense_cost(params), runs),
        *robustness,
    ]


def record_bytes(folder: str | None, size: int | None, real: int) -> float:
    """Return the mean size of a record: `real` for images from a folder, else that of a drawn picture of this side."""
    return real if folder or not size else DRAWN_BYTES_PER_PIXEL * size**2


def disk_bytes(params: Params) -> dict[str, float]:
    """Return the bytes of what the pipeline keeps on disk."""
    imagenet, ade20k = params.prepare_imagenet, params.prepare_ade20k
    image = record_bytes(params.data.imagenet, imagenet.size, IMAGE_BYTES)
    scene = record_bytes(params.data.ade20k, ade20k.size, SCENE_BYTES)
    width = fake_teacher(params).feature_dim
    model = build_fake(lambda: MaskedPretraining(params.model, milan_row(params), params.pretrain.mask_ratio, width))
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


def measure_rate(params: Params) -> float:
    """Measure half the FLOP/s of a large matrix product in the recipe's precision on this machine."""
    device = resolve_device(params.compute)
    dtype = DTYPES[resolve_compute(params.compute, params.model).precision]
    side = 8192 if device.type == "cuda" else 1024
    matrix = torch.ones(side, side, device=device, dtype=dtype)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        (matrix @ matrix).sum().item()
        times.append(time.perf_counter() - began)
    return side**3 / min(times)  # the product takes 2 * side**3


def format_plan(params: Params, rate: float, source: str) -> str:
    """Return the whole plan as text. rate: FLOP/s that one device sustains; source: a note on where that number is from."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        stages, components, kept = stage_plans(params), component_flops(params), disk_bytes(params)
    head = ["stage", "runs", "images", "epochs", "steps", "M parameters", "GFLOP/image", "GB/process", "hours on 1", "hours on 8"]
    rows = [head]
    for stage in stages:
        counts = [f"{stage.runs}", f"{stage.images:,}", f"{stage.epochs:.4g}", f"{stage.steps:,}"]
        costs = [f"{stage.cost.parameters / 1e6:.1f}", f"{stage.cost.step_flops / 1e9:.4g}", f"{stage.memory / 1e9:.3g}"]
        hours = stage.flops / rate / 3600
        rows.append([stage.name, *counts, *costs, f"{hours:.3g}", f"{hours / 8:.3g}"])
    total_hours = sum(stage.flops for stage in stages) / rate / 3600
    rows.append(["all", *[""] * (len(head) - 3), f"{total_hours:.3g}", f"{total_hours / 8:.3g}"])
    forward = ", ".join(f"{name} {value / 1e9:.4g}" for name, value in components.items())
    return "\n".join([
        f"recipe {params.scale}, {params.model.name} at {params.model.image_size} px, "
        f"at {rate / 1e12:.3g} TFLOP/s a device ({source})",
        "", aligned(rows, left=1), "",
        f"GFLOP of an image, forward: {forward}. A step is the teacher's forward pass and three of the student's.",
        "GB/process: weights, gradients, AdamW's moments and the activations of a micro-batch, in float32; "
        "bf16 keeps about half of the activations.",
        "Hours are arithmetic alone: no loading, no evaluation, all devices busy.",
        "disk: " + ", ".join(f"{name} {size / 1e9:,.3g} GB" for name, size in kept.items()) + ".",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="the recipe (default: %(default)s)")
    parser.add_argument("--scale", help="the recipe of this name in conf/scale instead")
    parser.add_argument("--tflops", type=float, help="TFLOP/s that one device sustains in these steps (default: measured here)")
    args = parser.parse_args()
    try:
        with explain_os_errors():
            params = read_params(args.params) if args.scale is None else compose_recipe(args.scale)
            if args.tflops is not None and not 0 < args.tflops * 1e12 < float("inf"):
                raise UserError(f"--tflops {args.tflops} must be a number above 0.")
            if args.tflops:
                print(format_plan(params, args.tflops * 1e12, "given"))
            else:
                print(format_plan(params, measure_rate(params), "half of a matrix product's here"))
    except UserError as error:
        fail(str(error))


if __name__ == "__main__":
    main()
