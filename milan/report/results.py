"""Read results: a row per variant and seed from metrics files, their summary over seeds, and published numbers apart."""

import json
import math
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from milan.core.errors import UserError, listed
from milan.params import Params
from milan.report.text import decimal

MEASURES = {  # column: (stage, name in its metrics file)
    "linear": ("linear_eval", "linear_eval/top1"),
    "knn": ("linear_eval", "linear_eval/knn_top1"),
    "attentive": ("attentive_probe", "attentive_probe/top1"),
    "finetune": ("finetune", "finetune/top1"),
    "miou": ("segment", "segment/miou"),
    "dense": ("dense_probe", "dense_probe/miou"),
}
ZERO_SHOT = {  # further columns, of variants that predict CLIP features, when the teacher has a text tower
    "zero_shot": ("linear_eval", "linear_eval/zero_shot_top1"),
    "zero_shot_masked": ("linear_eval", "linear_eval/zero_shot_masked_top1"),
}
OPTIONAL = {  # columns that may have no number
    **ZERO_SHOT,
    "corrupted": ("robustness", "robustness/finetune/corrupted_top1"),  # without a set, not measured
}
ALL_MEASURES = {**MEASURES, **OPTIONAL}
HEADS = {"finetune": "fine-tuned", "linear": "linear layer"}  # whose robustness is measured
ROBUSTNESS_TITLES = {  # measures of robustness; others are the top-1 of a corruption
    "corrupted_top1": "Corrupted top-1",
    "mce": "ImageNet-C mCE (lower is better)",
    "imagenet_a_top1": "ImageNet-A",
    "imagenet_r_top1": "ImageNet-R",
    "imagenet_sketch_top1": "ImageNet-Sketch",
    "imagenet_v2_top1": "ImageNet-V2",
    "corrupted_extra_top1": "Extra corruptions",
}
TITLES = {
    "linear": "Linear eval",
    "knn": "k-NN",
    "zero_shot": "Zero-shot",
    "zero_shot_masked": "Zero-shot, masked",
    "attentive": "Attentive probe",
    "finetune": "Fine-tuning",
    "corrupted": ROBUSTNESS_TITLES["corrupted_top1"],
    "miou": "ADE20K mIoU",
    "dense": "Dense probe mIoU",
}
PUBLISHED_MEASURES = ("linear", "finetune", "miou")  # of MEASURES, those that the paper and others publish
SHOWN = (*PUBLISHED_MEASURES, "dense")  # in charts and sentences on our own numbers
METHOD_NAMES = {  # {variant: name}, in the order in which the paper adds its ingredients
    "scratch": "No pretraining",
    "mae": "MAE",
    "clip_target": "CLIP target",
    "prompt_decoder": "CLIP target, prompting decoder",
    "milan": "MILAN",
}
FREE = ("variants", "seeds", "runtime.", "data.name")  # of a recipe: they leave the numbers of a variant and seed as they are
PUBLISHED = ("method", "backbone", "epochs", "batch_size", "teacher", *PUBLISHED_MEASURES, "kind", "source")
KINDS = {"published": "Published", "re-run": "Re-run by others"}


class EvaluationData(NamedTuple):
    """The data that our numbers were measured on."""

    name: str
    classes: int
    images: int  # validation images
    scene_classes: int
    scenes: int  # validation scenes; 0 where none were packed
    scenes_name: str
    constant_miou: float  # of answering every pixel with the most frequent class
    constant_pixel_accuracy: float
    train: int  # training images with labels

    @property
    def titles(self) -> dict[str, str]:
        """{column: title} for our own numbers."""
        return {**TITLES, "miou": f"{self.scenes_name} mIoU"}


class Results(NamedTuple):
    """The content of table, charts and page."""

    params: Params
    data: EvaluationData
    runs: pd.DataFrame  # a row per variant and seed: variant, seed, linear, knn, ...; NaN for a measure that it lacks
    ours: pd.DataFrame  # a row per variant: the means over seeds, and the ranges as linear_low, linear_high, ...
    published: pd.DataFrame
    teacher: dict  # metrics of the stage teacher
    importance: dict  # metrics of the stage extract_targets
    edited: tuple[str, ...] = ()  # runs whose training went on over an edit of code
    best: tuple[str, ...] = ()  # runs that were better before their last evaluation
    robustness: pd.DataFrame = pd.DataFrame()  # means over seeds: a row per variant and head, a column per measure
    missing: tuple[tuple[str, str], ...] = ()  # (stage, variant-seed) of the measures that were not run
    doubts: tuple[str, ...] = ()  # what stages said of numbers that mean nothing, each behind its run


def read_results(metrics: Path, published: Path, params: Params, partial: bool = False) -> Results:
    """Read metrics (the folder of one data set) and published numbers. Raises UserError naming a missing file or entry.

    partial: evaluations that left no file are no error; their numbers are NaN, and Results.missing names them."""
    missing = missing_runs(metrics, params) if partial else ()
    runs = read_runs(metrics, params, missing)
    reports = [read_metrics(metrics / f"{name}.json") for name in ("teacher", "extract_targets")]
    data = read_data(metrics, params, partial)
    words = {"edited": edited_runs(metrics), "best": better_before(metrics, params), "missing": missing, "doubts": doubts(metrics)}
    robustness = read_robustness(metrics, params)
    return Results(params, data, runs, summarise(runs), read_published(published), *reports, robustness=robustness, **words)


def missing_runs(metrics: Path, params: Params) -> tuple[tuple[str, str], ...]:
    """Return (stage, variant-seed) of each run of the stages of MEASURES that left no metrics file."""
    stages = dict.fromkeys(stage for stage, _ in MEASURES.values())
    names = [f"{variant}-{seed}" for variant in params.variants for seed in params.seeds]
    return tuple((stage, name) for stage in stages for name in names if not (metrics / stage / f"{name}.json").exists())


def edited_runs(metrics: Path) -> tuple[str, ...]:
    """Return "stage variant-seed (files)" for each run whose training went on although its code had been edited."""
    return tuple(f"{run} ({files})" for run, files in words_of_runs(metrics, "edited_while_training"))


def doubts(metrics: Path) -> tuple[str, ...]:
    """Return "stage variant-seed: sentences" for each run that has numbers that mean nothing."""
    return tuple(f"{run}: {sentences}" for run, sentences in words_of_runs(metrics, "doubts"))


def words_of_runs(metrics: Path, entry: str) -> list[tuple[str, str]]:
    """Return (run, words) for each metrics file with this entry. A run is "stage" or "stage variant-seed"."""
    words = {path.relative_to(metrics): read_metrics(path).get(entry) for path in sorted(metrics.glob("**/*.json"))}
    return [(" ".join(path.with_suffix("").parts), text) for path, text in words.items() if text]


def better_before(metrics: Path, params: Params) -> tuple[str, ...]:
    """Return "linear eval of MILAN, seed 0: 80.1 (last: 79.9)" for each run with an evaluation above the last, which the table
    shows."""
    said = []
    for (column, (stage, name)), variant, seed in product(MEASURES.items(), params.variants, params.seeds):
        path, best_name = metrics / stage / f"{variant}-{seed}.json", name.replace("/", "/best_")
        if path.exists() and best_name in read_metrics(path):
            best, last = (decimal(read_value(path, each)) for each in (best_name, name))
            if best != last:
                said.append(f"{title_in_sentence(TITLES[column])} of {method_name(variant)}, seed {seed}: {best} (last: {last})")
    return tuple(said)


def read_metrics(path: Path) -> dict:
    """Read a metrics file. Raises UserError when it is missing or not an object of numbers and words."""
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing: an earlier stage writes it. Run `dvc repro`, which runs the stages in order."
        ) from None
    except (ValueError, RecursionError) as error:  # JSON's and UTF-8's errors are ValueErrors
        raise UserError(f"{path} is no valid JSON ({error}). Delete it and run `dvc repro` again.") from None
    if not isinstance(metrics, dict) or not all(is_number(value) or isinstance(value, str) for value in metrics.values()):
        raise UserError(f"{path} is no valid JSON object of numbers and words. Delete it and run `dvc repro` again.")
    return metrics


def is_number(value: object) -> bool:
    """Return whether a value of JSON is a number that a float can hold."""
    return isinstance(value, float) or (isinstance(value, int) and value.bit_length() <= 1000)


def read_value(path: Path, name: str) -> float:
    """Read one number of a metrics file. Raises UserError when it is missing, or no number."""
    metrics = read_metrics(path)
    if name not in metrics:
        raise UserError(f"{path} has no entry {name!r}; it has {', '.join(metrics)}. Delete it and run `dvc repro` again.")
    if isinstance(metrics[name], str):
        raise UserError(f"{path}: {name} is {metrics[name]!r} and no number. Delete the file and run `dvc repro` again.")
    return metrics[name]


def optional_value(path: Path, name: str) -> float:
    """Read one number of a metrics file, NaN where the stage was not run or did not measure it."""
    return read_value(path, name) if path.exists() and name in read_metrics(path) else math.nan


def read_robustness(metrics: Path, params: Params) -> pd.DataFrame:
    """Return the means over seeds of every measure of robustness, NaN where a seed lacks it: a row per variant and head, a column
    per measure that a run has, those of ROBUSTNESS_TITLES first."""
    rows = {}
    for variant in params.variants:
        paths = [metrics / "robustness" / f"{variant}-{seed}.json" for seed in params.seeds]
        runs = [read_metrics(path) if path.exists() else {} for path in paths]
        for head in HEADS:
            prefix = f"robustness/{head}/"
            names = {name.removeprefix(prefix) for run in runs for name in run if name.startswith(prefix)}
            if names:
                rows[variant, head] = {name: sum(run.get(prefix + name, math.nan) for run in runs) / len(runs) for name in names}
    table = pd.DataFrame.from_dict(rows, orient="index")
    first = [name for name in ROBUSTNESS_TITLES if name in table]
    return table[[*first, *sorted(set(table) - set(first))]]


def read_runs(metrics: Path, params: Params, missing: tuple[tuple[str, str], ...] = ()) -> pd.DataFrame:
    """Return a row per variant and seed of the recipe: variant, seed, and a column for each of TITLES, NaN also for infinity and
    for what is missing."""

    def numbers(variant: str, seed: int) -> dict:
        values = dict.fromkeys(TITLES, math.nan)
        for column, (stage, name) in ALL_MEASURES.items():
            if (stage, f"{variant}-{seed}") not in missing:
                read = read_value if column in MEASURES else optional_value
                values[column] = read(metrics / stage / f"{variant}-{seed}.json", name)
        return {column: value if math.isfinite(value) else math.nan for column, value in values.items()}

    rows = [
        {"variant": variant, "seed": seed, **numbers(variant, seed)} for variant in params.variants for seed in params.seeds
    ]
    return pd.DataFrame(rows, columns=["variant", "seed", *TITLES])


def summarise(runs: pd.DataFrame) -> pd.DataFrame:
    """Return mean, minimum and maximum over seeds of each variant, in the order of the runs; NaN where a seed has no number."""
    seeds = runs.groupby("variant", sort=False)[list(TITLES)]
    summary = seeds.agg(["mean", "min", "max"])
    complete = seeds.agg(lambda values: values.notna().all())
    suffix = {"mean": "", "min": "_low", "max": "_high"}
    for column, statistic in summary:
        summary[column, statistic] = summary[column, statistic].where(complete[column])
    summary.columns = [column + suffix[statistic] for column, statistic in summary.columns]
    return summary.round(4)


def without_number(results: Results) -> list[str]:
    """Return "linear eval of MILAN, seed 1" for each number that a run should have, and has not (NaN or infinity)."""
    runs, titles = results.runs, results.data.titles
    stage_of = {column: stage for column, (stage, _) in ALL_MEASURES.items()}
    columns = [column for column in TITLES if column in MEASURES or runs[column].notna().any()]
    asked = {column: runs["variant"].isin(runs.loc[runs[column].notna(), "variant"]) | (column in MEASURES) for column in columns}
    return [
        f"{title_in_sentence(titles[column])} of {method_name(run.variant)}, seed {run.seed}"
        for column in columns
        for run in runs[runs[column].isna() & asked[column]].itertuples()
        if (stage_of[column], f"{run.variant}-{run.seed}") not in results.missing
    ]


def not_run(results: Results) -> list[str]:
    """Return "segment" for each stage that was not run, "segment (mae-0, milan-0)" where it was run for others."""
    names: dict[str, list[str]] = {}
    for stage, name in results.missing:
        names.setdefault(stage, []).append(name)
    return [stage if len(some) == len(results.runs) else f"{stage} ({listed(some)})" for stage, some in names.items()]


def shown(results: Results) -> list[str]:
    """Return the columns of SHOWN whose stage was run."""
    return [column for column in SHOWN if MEASURES[column][0] not in not_run(results)]


def title_in_sentence(title: str) -> str:
    """Return a column's title inside a sentence."""
    return title if title.startswith("ADE20K") else title[0].lower() + title[1:]


def read_data(metrics: Path, params: Params, partial: bool = False) -> EvaluationData:
    """Read the names and sizes of the evaluation data. Raises UserError when a metrics file is missing; partial: there may be no
    scenes."""
    imagenet, scenes = metrics / "prepare_imagenet.json", metrics / "prepare_ade20k.json"
    constants = ("constant_miou", "constant_pixel_accuracy")
    none = partial and not scenes.exists()
    return EvaluationData(
        params.data.title,
        read_value(imagenet, "prepare_imagenet/classes"),
        read_value(imagenet, "prepare_imagenet/val"),
        params.prepare_ade20k.classes,
        0 if none else read_value(scenes, "prepare_ade20k/val"),
        "Segmentation" if params.data.ade20k is None else "ADE20K",
        *(math.nan if none else read_value(scenes, f"prepare_ade20k/{name}") for name in constants),
        read_value(imagenet, "prepare_imagenet/train"),
    )


def read_published(path: Path) -> pd.DataFrame:
    """Read the published numbers. Raises UserError naming a missing column, a cell that is no number, or an unknown kind."""
    if not path.exists():
        raise UserError(f"{path} is missing: it holds the published numbers (git checkout -- {path} restores it).")
    try:
        published = pd.read_csv(path, dtype={"epochs": "Int64", "batch_size": "Int64"})
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{path} is no table of published numbers ({error}).") from None
    missing = [name for name in PUBLISHED if name not in published]
    if missing:
        raise UserError(f"{path} lacks the column {missing[0]}; it must have {', '.join(PUBLISHED)}.")
    textual = [name for name in PUBLISHED_MEASURES if not pd.api.types.is_numeric_dtype(published[name])]
    if textual:
        raise UserError(
            f"{path}: the column {textual[0]} has a cell that is no number; leave a cell empty where nothing is published."
        )
    unknown = sorted(set(published["kind"].astype(str)) - set(KINDS))
    if unknown:
        raise UserError(f"{path}: kind must be {' or '.join(KINDS)}, not {unknown[0]!r}.")
    return published


def method_name(variant: str) -> str:
    """Return a variant's name in tables and figures."""
    return METHOD_NAMES.get(variant, variant)


def name_in_sentence(variant: str) -> str:
    """Return a variant's name inside a sentence."""
    return method_name(variant).replace("No pretraining", "no pretraining")
