"""What a recipe costs, before anything runs: images, steps, parameters, arithmetic, memory, disk and hours.

    python -m milan.plan                              # of params.yaml
    python -m milan.plan --scale paper --tflops 250   # of conf/scale/paper.yaml, on GPUs that sustain 250 TFLOP/s

Parameters, arithmetic and activations are counted by torch itself on the very models of the stages, without computing
or storing anything (fake tensors). Hours are arithmetic over a sustained rate: benchmarks/step.py measures it; without
--tflops, half of what a large matrix product reaches here is assumed.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from milan.core.errors import UserError
from milan.core.files import explain_os_errors
from milan.core.program import fail
from milan.core.validation import validate
from milan.evaluation.classifier import build_classifier
from milan.method.encoder import Encoder
from milan.method.model import MaskedPretraining
from milan.method.target_bank import bank_bytes
from milan.params import AblationRow, Params, Training, read_params
from milan.segmentation import upernet
from milan.teacher.clip import tiny_config
from milan.teacher.frozen import build_tower
from milan.teacher.released import describe
from milan.teacher.towers import Tower
from milan.training.device import DTYPES, resolve_device, resolve_precision

IMAGE_BYTES = 110_000  # of an ImageNet JPEG, in the mean
SCENE_BYTES = 45_000  # of an ADE20K scene with its annotation, in the mean
DRAWN_PIXEL_BYTES = 2_500 / 48**2  # of the built-in world's JPEGs
CLASSES = 1000  # of ImageNet
TOKENS = 20 * 49  # of a vocabulary for the built-in captions; a small share of any figure


@dataclass(frozen=True)
class Cost:
    """Of one image in one training step; flops forward, backward twice that where gradients flow."""

    parameters: int  # trained ones
    frozen_flops: float  # forward only
    trained_flops: float  # forward
    activations: int  # bytes kept for the backward pass

    @property
    def step_flops(self) -> float:
        return self.frozen_flops + 3 * self.trained_flops


@dataclass(frozen=True)
class Line:
    """A stage of the plan."""

    name: str
    images: int
    epochs: float
    batch_size: int
    micro_batch: int
    cost: Cost
    runs: int  # variants times seeds

    @property
    def steps(self) -> int:
        return max(1, round(self.epochs * (self.images // self.batch_size)))

    @property
    def flops(self) -> float:
        return self.runs * self.steps * self.batch_size * self.cost.step_flops

    @property
    def memory(self) -> float:
        """Bytes of one process: weight, gradient and two moments in float32, and the micro-batch's activations."""
        return 16 * self.cost.parameters + self.micro_batch * self.cost.activations


def unmade(make: Callable[[], nn.Module]) -> nn.Module:
    """A model with shapes and no values; call it under FakeTensorMode."""
    with unset_fake_temporarily(), torch.device("meta"):
        model = make()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty(parameter.shape), parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
    return model


def counted(forward: Callable[[], Tensor], parameters: list[nn.Parameter]) -> tuple[float, int]:
    """(flops, bytes kept for the backward pass) of one forward pass."""
    weights = {id(parameter) for parameter in parameters}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if id(tensor) not in weights and id(tensor._base) not in weights:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter, saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return float(counter.get_total_flops()), sum(kept.values())


def cost(model: nn.Module, forward: Callable[[], Tensor], images: int, frozen: float = 0.0) -> Cost:
    """Of a model that is trained, from a forward pass over `images` images; frozen: flops an image of what is not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    flops, kept = counted(forward, list(model.parameters()))
    return Cost(sum(parameter.numel() for parameter in trained), frozen, flops / images, kept // images)


def pretrain_cost(p: Params, variant: str) -> Cost | None:
    row, m = p.pretrain.ablation[variant], p.model
    if row.target == "none" or p.pretrain.weights:
        return None
    tower = teacher(p)
    width = tower.feature_dim
    model = unmade(lambda: MaskedPretraining(m, row, p.pretrain.mask_ratio, width))
    images, noise = torch.randn(1, 3, m.image_size, m.image_size), torch.randn(1, m.n_patches)
    online = row.target == "clip" and not p.extract_targets.views
    frozen = flops_of(tower, view_of(tower)) if online else 0.0
    return cost(
        model, lambda: model(images, noise, torch.randn(1, 1 + m.n_patches, width), torch.rand(1, m.n_patches)), 1, frozen
    )


def parts(p: Params) -> dict[str, float]:
    """Forward flops an image of teacher, encoder (visible patches) and decoder, of MILAN's own recipe."""
    m, tower = p.model, teacher(p)
    model = unmade(lambda: MaskedPretraining(m, milan_row(p), p.pretrain.mask_ratio, tower.feature_dim))
    images, visible = torch.randn(1, 3, m.image_size, m.image_size), torch.arange(model.n_visible)[None]
    masked = torch.arange(model.n_visible, m.n_patches)[None]
    latent = torch.randn(1, 1 + model.n_visible, m.encoder.embed_dim)
    return {
        "teacher": flops_of(tower, view_of(tower)),
        "encoder": flops_of(model.encoder, images, visible),
        "decoder": flops_of(model.decoder, latent, visible, masked),
    }


def flops_of(model: nn.Module, *inputs: Tensor) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    return float(counter.get_total_flops())


def teacher(p: Params) -> Tower:
    t = p.teacher
    with unset_fake_temporarily():
        config = tiny_config(t.tiny, p.model, list(range(TOKENS))) if t.tiny else describe(t.pretrained)
    return unmade(lambda: build_tower(config))


def view_of(tower: Tower) -> Tensor:
    """An image of the size that the teacher looks at."""
    return torch.randn(1, 3, tower.size, tower.size)


def linear_cost(p: Params) -> Cost:
    """The frozen encoder's forward pass; the linear layer is next to nothing. Banked views are encoded once."""
    images = torch.randn(1, 3, p.model.image_size, p.model.image_size)
    x, features = p.linear_eval, flops_of(unmade(lambda: Encoder(p.model)), images)
    share = 1.0 if x.views == 0 else min(1.0, x.views / x.epochs)
    width = p.model.encoder.embed_dim
    return Cost(width * CLASSES, features * share, 2.0 * width * CLASSES, 4 * width)


def finetune_cost(p: Params) -> Cost:
    vit = unmade(lambda: build_classifier(p.model, p.finetune, CLASSES, Encoder(p.model).vit.state_dict())).train()
    images = torch.randn(2, 3, p.model.image_size, p.model.image_size)
    return cost(vit, lambda: vit(images), 2)


def segment_cost(p: Params) -> Cost:
    s, m = p.segment, p.model
    sizes = (s.crop_size, m.patch_size, m.encoder.embed_dim, m.encoder.depth, m.encoder.num_heads)
    heads = (p.prepare_ade20k.classes, s.channels, s.aux_channels, s.out_blocks)
    model = unmade(lambda: upernet.Segmenter(*sizes, *heads, norm="batch")).train()
    images = torch.randn(2, 3, s.crop_size, s.crop_size)
    return cost(model, lambda: model(images), 2)


def lines(p: Params) -> list[Line]:
    """The training stages, all variants and seeds together."""
    train, scenes, seeds = p.prepare_imagenet.train, p.prepare_ade20k.train, len(p.seeds)

    def line(name: str, images: int, training: Training, each: Cost, runs: int) -> Line:
        return Line(name, images, training.epochs, training.batch_size, training.micro_batch, each, runs)

    found = [
        line(f"pretrain {variant}", train, p.pretrain, each, seeds)
        for variant in p.variants
        if (each := pretrain_cost(p, variant))
    ]
    runs = seeds * len(p.variants)
    labelled = round(train * p.finetune.labels)
    found += [line("linear_eval", train, p.linear_eval, linear_cost(p), runs)]
    found += [line("finetune", labelled, p.finetune, finetune_cost(p), runs)]
    return [*found, line("segment", scenes, p.segment, segment_cost(p), runs)]


def record_bytes(given: str | None, size: int | None, real: int) -> float:
    """Of a record in the mean: a drawn picture of this size, or one of the real set."""
    return real if given or not size else DRAWN_PIXEL_BYTES * size**2


def disk(p: Params) -> dict[str, float]:
    """Bytes of what the pipeline keeps."""
    i, s = p.prepare_imagenet, p.prepare_ade20k
    image, scene = record_bytes(p.data.imagenet, i.size, IMAGE_BYTES), record_bytes(p.data.ade20k, s.size, SCENE_BYTES)
    width = teacher(p).feature_dim
    model = unmade(lambda: MaskedPretraining(p.model, milan_row(p), p.pretrain.mask_ratio, width))
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    return {
        "records": (i.train + i.val + i.pairs) * image + (s.train + s.val) * scene,
        "target bank": bank_bytes(i.train, p.extract_targets.views, p.model.n_patches, width),
        "weights, a variant and seed": weights,
        "a save to resume from (two are kept)": 3 * weights,
    }


def milan_row(p: Params) -> AblationRow:
    """The recipe's row for MILAN, else the first that pretrains, else the paper's."""
    rows = [p.pretrain.ablation.get("milan"), *p.pretrain.ablation.values()]
    return next((row for row in rows if row and row.target != "none"), AblationRow("clip", "prompt", "semantic"))


def rate_here(p: Params) -> float:
    """Half of the FLOP/s of a large matrix product in the recipe's precision on this machine."""
    device = resolve_device(p.compute)
    dtype = DTYPES[resolve_precision(p.compute, device)]
    n = 8192 if device.type == "cuda" else 1024
    a = torch.ones(n, n, device=device, dtype=dtype)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        (a @ a).sum().item()
        times.append(time.perf_counter() - began)
    return n**3 / min(times)


def table(rows: list[list[str]]) -> str:
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.rjust(w) if k else cell.ljust(w) for k, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )


def plan(p: Params, rate: float, source: str) -> str:
    """The whole plan as text; rate: FLOP/s that one device sustains."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        stages, each, kept = lines(p), parts(p), disk(p)
    head = ["stage", "runs", "images", "epochs", "steps", "M parameters", "GFLOP/image", "GB/process", "hours on 1", "hours on 8"]
    rows = [head]
    for s in stages:
        hours = s.flops / rate / 3600
        figures = [f"{s.runs}", f"{s.images:,}", f"{s.epochs:.4g}", f"{s.steps:,}", f"{s.cost.parameters / 1e6:.1f}"]
        rows.append(
            [s.name, *figures, f"{s.cost.step_flops / 1e9:.4g}", f"{s.memory / 1e9:.3g}", f"{hours:.3g}", f"{hours / 8:.3g}"]
        )
    whole = sum(s.flops for s in stages) / rate / 3600
    rows.append(["all", *[""] * (len(head) - 3), f"{whole:.3g}", f"{whole / 8:.3g}"])
    forward = ", ".join(f"{name} {value / 1e9:.4g}" for name, value in each.items())
    return "\n".join([
        f"recipe {p.scale}, {p.model.name} at {p.model.image_size} px, at {rate / 1e12:.3g} TFLOP/s a device ({source})", "", table(rows), "",
        f"GFLOP of an image, forward: {forward}. A step is the teacher's forward pass and three of the student's.",
        "GB/process: weights, gradients, AdamW's moments and the activations of a micro-batch, in float32; bf16 keeps about half of the activations.",
        "Hours are arithmetic alone: no loading, no evaluation, all devices busy.",
        "disk: " + ", ".join(f"{name} {size / 1e9:,.3g} GB" for name, size in kept.items()) + ".",
    ])  # fmt: skip


def composed(scale: str) -> Params:
    """The recipe of conf/scale/<scale>.yaml, as DVC would compose it."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    known, path = sorted(path.stem for path in Path("conf/scale").glob("*.yaml")), f"conf/scale/{scale}.yaml"
    if not known:
        raise UserError("There is no conf/scale here, where the recipes are: run from the repository's root.")
    if scale not in known:  # and so nothing that hydra would read as more than a name
        raise UserError(f"There is no scale {scale!r}; conf/scale has {', '.join(known)}.")
    with initialize_config_dir(str(Path("conf").absolute()), version_base=None):
        try:
            tree = OmegaConf.to_container(compose("config", overrides=[f"scale={scale}"]), resolve=True)
        except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, RecursionError) as error:
            raise UserError(f"{path} cannot be composed: {error}") from None
    return validate(Params, tree, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="the recipe (default: %(default)s)")
    parser.add_argument("--scale", help="a recipe of conf/scale instead")
    parser.add_argument("--tflops", type=float, help="what one device sustains in these steps (default: measured here)")
    args = parser.parse_args()
    try:
        with explain_os_errors():
            p = read_params(args.params) if args.scale is None else composed(args.scale)
            if args.tflops is not None and not 0 < args.tflops * 1e12 < float("inf"):
                raise UserError(f"--tflops {args.tflops} must be a number above 0.")
            rate, source = (args.tflops * 1e12, "given") if args.tflops else (rate_here(p), "half of a matrix product's here")
            print(plan(p, rate, source))
    except UserError as error:
        fail(str(error))


if __name__ == "__main__":
    main()
