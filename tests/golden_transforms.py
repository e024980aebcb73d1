"""Golden file J, transforms: compare every argument of every transform of the release with the behaviour of ours.

Reference images come from torchvision's classes on PIL images, as in the release. Distributions are compared by the
Kolmogorov-Smirnov distance between 2,000 draws of ours and 2,000 of a reference."""

import math
from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np
import torch
from PIL import Image
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import functional as pil
from torchvision.transforms import transforms as torchvision

from milan import params
from milan.data import transforms
from stages import finetune, linear_eval

DRAWS = 2_000
KS_BOUND = 1.95 * math.sqrt(2 / DRAWS)  # exceeded once in a thousand pairs of samples of one distribution
SIDES = (300, 500)  # elongated, so that some crops do not fit at first: retries and clipping take effect
GREY_LEVELS = 2  # uint8 tensors against PIL


def rows(stated: dict, p: params.Params) -> Iterator[tuple]:
    for name, pipeline in stated.items():
        stage = {"pretrain": p.pretrain, "finetune": p.finetune, "linprobe": p.linear_eval}[name.split("_")[0]]
        for place, entry in enumerate(pipeline):
            kind = entry["transform"].split(".")[-1]
            check = CHECKS.get(kind)
            what = f"{name}[{place}] {kind}"
            if check is None:
                yield what, math.inf, 0, "nothing here checks it"
                continue
            args = {**entry["args"], "simple": entry["transform"].startswith("official")}
            results = check(args, stage, p, name)
            unchecked = set(entry["args"]) - {argument for argument, *_ in results}
            results += [(argument, math.inf, 0) for argument in sorted(unchecked)]
            for argument, error, allowed, *note in results:
                yield f"{what} {argument}".strip(), error, allowed, *note


def differ(ours, stated) -> float:
    """Return the largest difference between numbers, or lists or dicts of them; 1 where anything else is unequal."""
    if isinstance(stated, list | tuple) and isinstance(ours, list | tuple) and len(ours) == len(stated):
        return max((differ(a, b) for a, b in zip(ours, stated, strict=True)), default=0.0)
    if isinstance(stated, dict) and isinstance(ours, dict) and ours.keys() == stated.keys():
        return max((differ(ours[key], stated[key]) for key in stated), default=0.0)
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (ours, stated))
    return abs(ours - stated) if numbers else float(ours != stated or isinstance(ours, bool) != isinstance(stated, bool))


def picture() -> Image.Image:
    """Return noise at two scales, in which any other resampling than the reference's shows."""
    draw = np.random.default_rng(0)
    coarse = Image.fromarray(draw.integers(0, 256, (20, 30, 3), dtype=np.uint8)).resize(SIDES[::-1], Image.BICUBIC)
    fine = draw.integers(-40, 40, (*SIDES, 3))
    return Image.fromarray((np.asarray(coarse) + fine).clip(0, 255).astype(np.uint8))


def tensor_of(image: Image.Image) -> torch.Tensor:
    return pil.pil_to_tensor(image)


def grey_levels(ours: torch.Tensor, reference: Image.Image) -> float:
    return (ours.int() - tensor_of(reference).int()).abs().max().item()


def resampling(stated: int | str) -> torchvision.InterpolationMode:
    """Return the interpolation of PIL's number or name."""
    return torchvision.InterpolationMode[(Image.Resampling(stated).name if isinstance(stated, int) else stated)]


def boxes(draw: Callable, scale: list[float]) -> np.ndarray:
    """Draw boxes (DRAWS, 5): top, left, height, width, flip."""
    generator = torch.Generator().manual_seed(0)
    return np.array([draw(*SIDES, scale, generator) for _ in range(DRAWS)], dtype=float)


def stage_draw(name: str, p: params.Params) -> Callable:
    """Return the function with which the stage draws its crops."""
    if name.startswith("linprobe"):
        return linear_eval.training_data(p, 0, [], None, None, torch.device("cpu"))[0].draw_crop
    return finetune.samples(p, [], 0).draw_crop if name.startswith("finetune") else transforms.draw_crop


def reference_boxes(args: dict) -> np.ndarray:
    """Draw boxes (DRAWS, 4) by torchvision's rule or, where "simple", by the rule of the release's util/crop.py: no retries."""
    torch.manual_seed(1)
    if not args["simple"]:
        image = torch.empty(3, *SIDES)
        return np.array([torchvision.RandomResizedCrop.get_params(image, args["scale"], args["ratio"]) for _ in range(DRAWS)])
    draw = np.random.default_rng(1)
    area = SIDES[0] * SIDES[1] * draw.uniform(*args["scale"], DRAWS)
    ratio = np.exp(draw.uniform(*np.log(args["ratio"]), DRAWS))
    height, width = (np.minimum(np.sqrt(area * r).round(), side) for r, side in zip((1 / ratio, ratio), SIDES, strict=True))
    top, left = (draw.integers(0, side - cut + 1) for side, cut in zip(SIDES, (height, width), strict=True))
    return np.stack([top, left, height, width], axis=1)


def ks(a: np.ndarray, b: np.ndarray) -> float:
    """Return the Kolmogorov-Smirnov distance of two samples."""
    places = np.concatenate([a, b])
    below = [np.searchsorted(np.sort(sample), places, "right") / len(sample) for sample in (a, b)]
    return np.abs(below[0] - below[1]).max()


def crop_rows(args: dict, stage, p: params.Params, name: str) -> list[tuple]:
    ours, reference = boxes(stage_draw(name, p), stage.crop_scale), reference_boxes(args)
    distance = max(ks(ours[:, i], reference[:, i]) for i in range(4))
    box = (10, 20, 250, 331)
    image, size = picture(), args["size"]
    reference = pil.resized_crop(image, *box, size, interpolation=resampling(args["interpolation"]))
    off = grey_levels(transforms.crop(tensor_of(image), (*box, False), p.model.image_size), reference)
    return [
        ("size", differ([p.model.image_size] * 2, size), 0),
        ("scale", differ(stage.crop_scale, args["scale"]), 1e-12),
        ("ratio", distance, KS_BOUND, "distance of the distributions of boxes"),
        ("interpolation", off, GREY_LEVELS, "grey levels from PIL"),
        *([("antialias", float(not args["antialias"]), 0, "as PIL does")] if "antialias" in args else []),
    ]


def flip_rows(args: dict, stage, p: params.Params, name: str) -> list[tuple]:
    share = boxes(stage_draw(name, p), stage.crop_scale)[:, 4].mean()
    box = (0, 0, 64, 64)
    image = torch.arange(3 * 64 * 64).view(3, 64, 64).to(torch.uint8)
    mirrored = transforms.crop(image, (*box, True), 64).equal(transforms.crop(image, (*box, False), 64).flip(-1))
    return [("p", abs(share - args["p"]) + (not mirrored), 5 * math.sqrt(args["p"] * (1 - args["p"]) / DRAWS), "share of flips")]


def resize_rows(args: dict, stage, p: params.Params, name: str) -> list[tuple]:
    image, size = picture(), p.model.image_size
    reference = pil.center_crop(pil.resize(image, args["size"], resampling(args["interpolation"])), size)
    off = grey_levels(transforms.centre(tensor_of(image), stage.resize, size), reference)
    return [
        ("size", differ(stage.resize, args["size"]), 0),
        ("interpolation", off, GREY_LEVELS, "grey levels from PIL"),
        ("antialias", float(not args["antialias"]), 0, "as PIL does"),
        ("max_size", float(args["max_size"] is not None), 0),
    ]


def centre_rows(args: dict, stage, p: params.Params, name: str) -> list[tuple]:
    return [("size", differ(list(transforms.centre(tensor_of(picture()), stage.resize, p.model.image_size).shape[-2:]), args["size"]), 0)]


def normalise_rows(args: dict, stage, p: params.Params, name: str) -> list[tuple]:
    mean, std = (torch.tensor(args[key], dtype=torch.float64).view(3, 1, 1) for key in ("mean", "std"))
    images = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256)
    error = (transforms.normalise(images) - (images / 255 - mean) / std).abs().max().item()
    return [("mean", error, 1e-6), ("std", error, 1e-6), ("inplace", None, None, "of no effect")]


def scale_rows(args: dict, stage, p: params.Params, name: str) -> list[tuple]:
    """ToTensor maps bytes to [0, 1], which is proved together with Normalize."""
    return [("", None, None, "with Normalize")]


def rand_augment_rows(args: dict, stage, p: params.Params, name: str) -> list[tuple]:
    ours = finetune.samples(p, [], 0).augment.augment
    spelled = [
        {
            "fillcolor": list(op.kwargs["fillcolor"]),
            "fn": op.aug_fn.__name__,
            "level": op.level_fn.__name__ if op.level_fn else None,
            "magnitude": op.magnitude,
            "magnitude_std": op.magnitude_std,
            "prob": op.prob,
            "resample": int(op.kwargs["resample"]),
        }
        for op in ours.ops
    ]
    bounded = all(op.magnitude_max is None for op in ours.ops)  # then timm clips to [0, 10]
    return [
        ("ops", differ(spelled, args["ops"]), 0, f"{len(spelled)} ops"),
        ("num_layers", differ(ours.num_layers, args["num_layers"]), 0),
        ("choice_weights", differ(ours.choice_weights, args["choice_weights"]), 0),
        ("choice", float(not bounded), 0, "timm's own draw; magnitude clipped to [0, 10]"),
    ]


def eraser(p: params.Params) -> tuple[RandomErasing, bool]:
    """Return timm's object as the stage builds it, and whether it receives normalised images."""
    seen = []

    def record(self, images):
        seen.append((self, images.clone()))
        return images

    image = tensor_of(picture())[None]
    with mock.patch.object(RandomErasing, "__call__", record):
        finetune.inputs(p.finetune.random_erasing, {"image": image, "label": torch.zeros(1)})
    return seen[0][0], seen[0][1].equal(transforms.normalise(image))


def erasing_rows(args: dict, stage, p: params.Params, name: str) -> list[tuple]:
    ours, after_normalise = eraser(p)
    arguments = [(key, differ(getattr(ours, key), stated), 1e-12) for key, stated in args.items() if key not in ("simple", "device")]
    return [*arguments, ("device", None, None, "the images' own"), ("order", float(not after_normalise), 0, "after Normalize")]


CHECKS = {
    "RandomResizedCrop": crop_rows,
    "RandomResizedCropAndInterpolation": crop_rows,
    "RandomHorizontalFlip": flip_rows,
    "RandAugment": rand_augment_rows,
    "ToTensor": scale_rows,
    "Normalize": normalise_rows,
    "RandomErasing": erasing_rows,
    "Resize": resize_rows,
    "CenterCrop": centre_rows,
}
