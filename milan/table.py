"""The table: metrics JSON -> rows in the paper's layout, beside the published numbers and never among them.

Our rows are of this recipe's data (at demo scale the built-in world, which nothing published was measured on);
published numbers and re-runs by others are ImageNet-1K and ADE20K figures, in tables of their own. What the text
says about the order of the variants is worked out from the numbers.
"""

import io
import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from milan.errors import UserError
from milan.params import Params

MEASURES = {  # column: (stage, name in its metrics file)
    "linear": ("linear_eval", "linear_eval/top1"),
    "knn": ("linear_eval", "linear_eval/knn_top1"),
    "finetune": ("finetune", "finetune/top1"),
    "miou": ("segment", "segment/miou"),
}
TITLES = {"linear": "Linear eval", "knn": "k-NN", "finetune": "Fine-tuning", "miou": "ADE20K mIoU"}
METHODS = {  # in the order in which the paper adds its ingredients
    "scratch": "No pretraining",
    "mae": "MAE",
    "clip_target": "MAE + CLIP target",
    "prompt_decoder": "MAE + CLIP target + prompting decoder",
    "milan": "MILAN",
}
CAPTIONS_CAVEAT = (
    "The CLIP teacher was trained on captions, which speak of the very things to be recognised. MILAN and every variant "
    "with a CLIP target draw on that extra information; MAE and no pretraining do not."
)
KINDS = {"published": "Published", "re-run": "Re-run by others"}
ELSEWHERE = "ImageNet-1K and ADE20K"
DASH = "–"


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
    runs: pd.DataFrame  # a row a variant and seed: variant, seed, linear, knn, finetune, miou
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
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing: an earlier stage writes it. Run `dvc repro`, which runs the stages in order.") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is no valid JSON ({error}). Delete it and run `dvc repro` again.") from None


def value_of(path: Path, name: str):
    found = read_metrics(path)
    if name not in found:
        raise UserError(f"{path} has no entry {name!r}; it has {', '.join(found)}. Delete it and run `dvc repro` again.")
    return found[name]


def read_runs(metrics: Path, p: Params) -> pd.DataFrame:
    def numbers(variant: str, seed: int) -> dict:
        return {column: value_of(metrics / stage / f"{variant}-{seed}.json", name) for column, (stage, name) in MEASURES.items()}

    return pd.DataFrame([{"variant": v, "seed": s, **numbers(v, s)} for v in p.variants for s in p.seeds])


def summary(runs: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds, and the smallest and the largest, of each variant, in the order of the runs."""
    found = runs.groupby("variant", sort=False)[list(MEASURES)].agg(["mean", "min", "max"])
    found.columns = [column if how == "mean" else f"{column}_{ {'min': 'low', 'max': 'high'}[how] }" for column, how in found.columns]
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
    found = pd.read_csv(path, dtype={"epochs": "Int64", "batch_size": "Int64"})
    strange = sorted(set(found["kind"]) - set(KINDS))
    if strange:
        raise UserError(f"{path}: kind must be {' or '.join(KINDS)}, not {strange[0]!r}.")
    return found


# ---------------------------------------------------------------------------------------------------------------- words


def method(variant: str) -> str:
    return METHODS.get(variant, variant)


def in_words(variant: str) -> str:
    return method(variant).replace("No pretraining", "no pretraining")


def order_said(r: Results) -> list[str]:
    """What the numbers say: how far the last ingredient gets, and where the order is not the one to expect."""
    return [*(lead_said(r, column) for column in ("linear", "finetune", "miou")), *expected_order_said(r)]


def lead_said(r: Results, column: str) -> str:
    """`MILAN: linear eval 36.9, 26.1 above MAE, 25.2 above no pretraining.`"""
    best = "milan" if "milan" in r.ours.index else r.ours.index[-1]
    value = r.ours[column].round(1)
    others = [f"{difference(value[best] - value[v])} {in_words(v)}" for v in r.ours.index if v != best]
    return f"{method(best)}: {lower(r.data.titles[column])} {value[best]:.1f}" + "".join(f", {words}" for words in others) + "."


def lower(title: str) -> str:
    """A column's title inside a sentence."""
    return title if title.startswith("ADE20K") else title[0].lower() + title[1:]


def difference(points: float) -> str:
    if abs(points) < 0.05:
        return "level with"
    return f"{abs(points):.1f} {'above' if points > 0 else 'below'}"


def expected_order_said(r: Results) -> list[str]:
    """Where a variant falls below the one that the paper builds it from."""
    chain = [variant for variant in METHODS if variant in r.ours.index]
    if len(chain) < 2:
        return []
    words = [f"In the paper each ingredient adds to the one before: {' < '.join(in_words(v) for v in chain)}."]
    for column in ("linear", "finetune", "miou"):
        value = r.ours[column].round(1)
        turned = [(a, b) for a, b in pairwise(chain) if value[b] < value[a]]
        said = "; ".join(f"{in_words(b)} ({value[b]:.1f}) is below {in_words(a)} ({value[a]:.1f}){overlap(r, column, a, b)}" for a, b in turned)
        words.append(f"{r.data.titles[column]}: " + (f"not the paper's order, {said}." if turned else "the same order here."))
    return words


def overlap(r: Results, column: str, first: str, second: str) -> str:
    """Whether a difference is more than chance: only seeds can tell."""
    if len(r.params.seeds) < 2:
        return ""
    (low_a, high_a), (low_b, high_b) = (r.ours.loc[v, [f"{column}_low", f"{column}_high"]] for v in (first, second))
    return ", though their ranges over seeds overlap" if max(low_a, low_b) <= min(high_a, high_b) else ""


def notes(r: Results) -> list[str]:
    """What a reader has to know to read our numbers."""
    d, seeds, t = r.data, len(r.params.seeds), r.teacher
    spread = f"Means over {seeds} seeds, the range in brackets" if seeds > 1 else "One seed, so no spread over seeds is known"
    words = [f"{spread}; the sampling error of a top-1 over {d.images:,} images is up to {50 / d.images**0.5:.1f} points."]
    if "teacher/linear_top1" in t:
        numbers = {"zero-shot": "zero_shot_top1", "linear": "linear_top1", "k-NN": "knn_top1"}
        words.append(f"The teacher itself: {', '.join(f'{k} {t[f'teacher/{v}']:.1f}' for k, v in numbers.items())}." if False else teacher_said(t, numbers))
    if "extract_targets/importance_on_object" in r.importance:
        on, area = (r.importance[f"extract_targets/{name}"] for name in ("importance_on_object", "object_area"))
        words.append(f"Of the teacher's patch importance {on:.1f} % falls on the object, which covers {area:.1f} % of the image.")
    return [*words, CAPTIONS_CAVEAT]
