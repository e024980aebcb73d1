"""Metrics JSON -> rows a variant and seed, their summary over seeds, and the published numbers, which stay apart."""

import json
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from milan.core.errors import UserError
from milan.params import Params

MEASURES = {  # column: (stage, name in its metrics file)
    "linear": ("linear_eval", "linear_eval/top1"),
    "knn": ("linear_eval", "linear_eval/knn_top1"),
    "finetune": ("finetune", "finetune/top1"),
    "miou": ("segment", "segment/miou"),
}
ZERO_SHOT = {  # the same, of the variants that predict CLIP features, where the teacher has a text tower
    "zero_shot": ("linear_eval", "linear_eval/zero_shot_top1"),
    "zero_shot_masked": ("linear_eval", "linear_eval/zero_shot_masked_top1"),
}
TITLES = {
    "linear": "Linear eval",
    "knn": "k-NN",
    "zero_shot": "Zero-shot",
    "zero_shot_masked": "Zero-shot, masked",
    "finetune": "Fine-tuning",
    "miou": "ADE20K mIoU",
}
METHODS = {  # in the order in which the paper adds its ingredients
    "scratch": "No pretraining",
    "mae": "MAE",
    "clip_target": "CLIP target",
    "prompt_decoder": "CLIP target, prompting decoder",
    "milan": "MILAN",
}
PUBLISHED = ("method", "backbone", "epochs", "batch_size", "teacher", "linear", "finetune", "miou", "kind", "source")
KINDS = {"published": "Published", "re-run": "Re-run by others"}


class Data(NamedTuple):
    """What our numbers were measured on."""

    name: str
    classes: int
    images: int  # for validation
    scene_classes: int
    scenes: int  # for validation
    scenes_name: str

    @property
    def titles(self) -> dict[str, str]:
        return {**TITLES, "miou": f"{self.scenes_name} mIoU"}


class Results(NamedTuple):
    """Everything that the writers need."""

    params: Params
    data: Data
    runs: pd.DataFrame  # a row a variant and seed: variant, seed, linear, knn, ..., NaN for what it has not
    ours: pd.DataFrame  # a row a variant: the means, and the range as linear_low, linear_high, ...
    published: pd.DataFrame
    teacher: dict
    importance: dict


def read_results(metrics: Path, published: Path, p: Params) -> Results:
    """metrics: the folder of one scale. Raises UserError naming the file or the entry that is missing."""
    runs = read_runs(metrics, p)
    reports = [read_metrics(metrics / f"{name}.json") for name in ("teacher", "extract_targets")]
    return Results(p, read_data(metrics, p), runs, summary(runs), read_published(published), *reports)


def read_metrics(path: Path) -> dict:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing: an earlier stage writes it. Run `dvc repro`, which runs the stages in order."
        ) from None
    except (ValueError, RecursionError) as error:  # JSON's and UTF-8's errors are ValueErrors
        raise UserError(f"{path} is no valid JSON ({error}). Delete it and run `dvc repro` again.") from None
    if not isinstance(found, dict) or not all(isinstance(value, (int, float, str)) for value in found.values()):
        raise UserError(f"{path} is no valid JSON object of numbers and words. Delete it and run `dvc repro` again.")
    return found


def value_of(path: Path, name: str):
    found = read_metrics(path)
    if name not in found:
        raise UserError(f"{path} has no entry {name!r}; it has {', '.join(found)}. Delete it and run `dvc repro` again.")
    return found[name]


def read_runs(metrics: Path, p: Params) -> pd.DataFrame:
    def numbers(variant: str, seed: int) -> dict:
        path = {stage: metrics / stage / f"{variant}-{seed}.json" for stage, _ in MEASURES.values()}
        found = {column: value_of(path[stage], name) for column, (stage, name) in MEASURES.items()}
        return found | {column: read_metrics(path[stage]).get(name, float("nan")) for column, (stage, name) in ZERO_SHOT.items()}

    rows = [{"variant": v, "seed": s, **numbers(v, s)} for v in p.variants for s in p.seeds]
    return pd.DataFrame(rows, columns=["variant", "seed", *TITLES])


def summary(runs: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds, and the smallest and the largest, of each variant, in the order of the runs."""
    found = runs.groupby("variant", sort=False)[list(TITLES)].agg(["mean", "min", "max"])
    suffix = {"mean": "", "min": "_low", "max": "_high"}
    found.columns = [column + suffix[how] for column, how in found.columns]
    return found.round(4)


def read_data(metrics: Path, p: Params) -> Data:
    imagenet, scenes = metrics / "prepare_imagenet.json", metrics / "prepare_ade20k.json"
    return Data(
        "the built-in world" if p.data.imagenet is None else "ImageNet-layout images",
        value_of(imagenet, "prepare_imagenet/classes"),
        value_of(imagenet, "prepare_imagenet/val"),
        p.prepare_ade20k.classes,
        value_of(scenes, "prepare_ade20k/val"),
        "Segmentation" if p.data.ade20k is None else "ADE20K",
    )


def read_published(path: Path) -> pd.DataFrame:
    if not path.exists():
        raise UserError(f"{path} is missing: it holds the published numbers (git checkout -- {path} restores it).")
    try:
        found = pd.read_csv(path, dtype={"epochs": "Int64", "batch_size": "Int64"})
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{path} is no table of published numbers ({error}).") from None
    missing = [name for name in PUBLISHED if name not in found]
    if missing:
        raise UserError(f"{path} lacks the column {missing[0]}; it must have {', '.join(PUBLISHED)}.")
    words = [name for name in ("linear", "finetune", "miou") if not pd.api.types.is_numeric_dtype(found[name])]
    if words:
        raise UserError(f"{path}: the column {words[0]} holds what is no number; leave a cell empty where nothing is published.")
    strange = sorted(set(found["kind"].astype(str)) - set(KINDS))
    if strange:
        raise UserError(f"{path}: kind must be {' or '.join(KINDS)}, not {strange[0]!r}.")
    return found


def method(variant: str) -> str:
    """A variant's name in tables and figures."""
    return METHODS.get(variant, variant)


def in_words(variant: str) -> str:
    """The same inside a sentence."""
    return method(variant).replace("No pretraining", "no pretraining")
