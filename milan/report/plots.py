"""Draw charts of the results. Colours are Okabe and Ito's, made for colour-blind readers; equal results give equal bytes."""

import io
import textwrap
from collections.abc import Iterable
from pathlib import Path

import matplotlib
import pandas as pd

from milan.core.errors import UserError
from milan.core.files import write_whole
from milan.params import Params
from milan.report.results import KINDS, PUBLISHED_MEASURES, SHOWN, Results, method_name, shown
from milan.report.text import decimal

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (after the backend is chosen)
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILION, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
GREY = "#999999"
VARIANT_COLOURS = {"scratch": GREY, "mae": ORANGE, "clip_target": SKY, "prompt_decoder": GREEN, "milan": VERMILION}
SHORT_NAMES = {
    "scratch": "none", "mae": "MAE", "clip_target": "CLIP\ntarget", "prompt_decoder": "prompt\ndecoder", "milan": "MILAN",
}  # fmt: skip
DPI = 150
WIDTH = 9.0  # inches, so 1350 pixels: legible also when a README shows 900
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
    "image.interpolation": "nearest",
    "legend.frameon": False,
    "text.parse_math": False,  # names of classes and variants are no formulas
}
plt.rcParams.update({**matplotlib.rcParamsDefault, **STYLE, "backend": "Agg"})

CURVES = {  # panel: (folder under curves, column, targets of the variants shown)
    "Pretraining, CLIP features: 2 – 2 cos": ("pretrain", "loss", ("clip",)),
    "Pretraining, pixels: squared error": ("pretrain", "loss", ("pixels",)),
    "Pretraining, k-NN of class tokens": ("pretrain", "knn_top1", ("pixels", "clip")),
    "Pretraining, RankMe of class tokens": ("pretrain", "rankme", ("pixels", "clip")),
    "Linear evaluation": ("linear_eval", "loss", ("none", "pixels", "clip")),
    "Attentive probe": ("attentive_probe", "loss", ("none", "pixels", "clip")),
    "Fine-tuning": ("finetune", "loss", ("none", "pixels", "clip")),
    "Segmentation": ("segment", "loss", ("none", "pixels", "clip")),
    "Dense probe": ("dense_probe", "loss", ("none", "pixels", "clip")),
}
AXES = {"loss": "loss", "knn_top1": "top-1 %", "rankme": "smooth rank"}


def colour(variant: str, variants: Iterable[str] = ()) -> str:
    """Return a variant's colour: fixed for the paper's variants; others take the spare colours in their order."""
    spare = [BLUE, PURPLE, BLACK, YELLOW]
    others = [v for v in variants if v not in VARIANT_COLOURS]
    return VARIANT_COLOURS.get(variant) or spare[others.index(variant) % len(spare) if variant in others else 0]


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG without date and software name, so that equal figures give equal bytes, and return the path."""
    data = io.BytesIO()
    figure.savefig(data, dpi=DPI, metadata={"Software": None})
    plt.close(figure)
    write_whole(path, data.getvalue())
    return path


def bars(results: Results) -> Figure:
    """Draw linear evaluation, fine-tuning, segmentation and dense probe of our variants."""
    figure, axes = plt.subplots(2, 2, figsize=(WIDTH, 5.6))
    draw_ours(axes.flat, results)
    return figure


def bars_beside_published(results: Results) -> Figure:
    """Draw our variants above, and published numbers and re-runs below on separate axes."""
    figure = plt.figure(figsize=(WIDTH, 10.2))
    ours, theirs = figure.subfigures(2, 1, height_ratios=[5.6, 4.6])
    draw_ours(ours.subplots(2, 2).flat, results)
    ours.suptitle(f"Our results on {results.data.name}", weight="bold", fontsize=12)
    draw_published(theirs.subplots(1, 3, sharey=True), results.published)
    theirs.suptitle("Others: ImageNet-1K and ADE20K, ViT-B/16 (sources in reports/table.md)", weight="bold", fontsize=12)
    return figure


def draw_ours(axes: Iterable[Axes], results: Results) -> None:
    """Draw the mean of each variant as a bar, the range over seeds as a whisker, seeds as dots, and as a dashed
    line chance, or the mIoU of a constant answer."""
    variants, data = list(results.ours.index), results.data
    chance = ("chance", 100 / max(data.classes, 1))  # without classes no accuracy is shown
    constant = ("constant answer", data.constant_miou)
    lines = {"linear": chance, "finetune": chance, "miou": constant, "dense": constant}
    titles = {**data.titles, "linear": "Linear eval, top-1", "finetune": "Fine-tuning, top-1"}
    measured = shown(results)
    for axis, column in zip(axes, SHOWN, strict=True):
        if column not in measured:
            axis.set_axis_off()
            axis.set_title(f"{titles[column]}\n(not run)")
            continue
        means, low, high = (results.ours[f"{column}{end}"] for end in ("", "_low", "_high"))
        axis.bar(range(len(variants)), means, color=[colour(v, variants) for v in variants], width=0.72)
        if len(results.params.seeds) > 1:
            axis.errorbar(range(len(variants)), means, [means - low, high - means], fmt="none", ecolor=BLACK, capsize=4, lw=1.2)
            for place, variant in enumerate(variants):
                points = results.runs.loc[results.runs["variant"] == variant, column]
                axis.plot([place] * len(points), points, "o", ms=3.5, mfc="white", mec=BLACK, mew=0.8)
        for place, (mean, top) in enumerate(zip(means, high, strict=True)):
            above = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center", "va": "bottom"}
            axis.annotate(decimal(mean), (place, 0 if pd.isna(top) else top), **above)
        words, level = lines[column]
        axis.axhline(level, color=BLACK, ls="--", lw=1)
        axis.set_xticks(range(len(variants)), [SHORT_NAMES.get(v, v) for v in variants], fontsize=8.5)
        axis.set_title(f"{titles[column]} %\n(dashed: {words}, {float(decimal(level, 2)):g} %)")
        axis.margins(y=0.16)


def draw_published(axes: Iterable[Axes], published: pd.DataFrame) -> None:
    """Draw published numbers as filled bars and re-runs by others as hatched bars, MILAN in its own colour."""
    rows = published.iloc[::-1]
    titles = {"linear": "Linear eval, top-1 %", "finetune": "Fine-tuning, top-1 %", "miou": "ADE20K mIoU %"}
    names = [textwrap.fill(name, 44) for name in rows["method"]]
    looks = [{"hatch": "///" if kind == "re-run" else None, "color": VERMILION if name.startswith("MILAN") else GREY}
             for kind, name in zip(rows["kind"], rows["method"], strict=True)]  # fmt: skip
    for axis, column in zip(axes, PUBLISHED_MEASURES, strict=True):
        low = rows[column].min() - 0.35 * (rows[column].max() - rows[column].min())
        for place, (value, look) in enumerate(zip(rows[column], looks, strict=True)):
            if pd.notna(value):
                axis.barh(place, value, height=0.7, edgecolor="white", **look)
                axis.annotate(
                    decimal(value), (value, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8.5
                )
            else:
                axis.annotate("–", (low, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8.5)
        axis.set_xlim(low, rows[column].max() + 0.25 * (rows[column].max() - low))
        axis.set_title(f"{titles[column]}\n(axis cut)", fontsize=10)
        axis.set_yticks(range(len(rows)), names, fontsize=8.5)
    handles = [plt.Rectangle((0, 0), 1, 1, fc=GREY, ec="white", hatch=hatch) for hatch in (None, "///")]
    axes[0].figure.legend(handles, KINDS.values(), loc="outside lower center", ncols=2)


def curves(folder: Path, params: Params, missing: Iterable[tuple[str, str]] = ()) -> Figure:
    """Draw the loss by epoch of every stage that trains, and k-NN and RankMe where pretraining was watched: a line for each
    variant and seed but for the (stage, variant-seed) that are missing."""
    teacher = {"teacher": [read_curve(folder / "teacher.csv", "loss")]}
    panels = {"Teacher, contrast": ("loss", teacher)}
    for title, (stage, column, targets) in CURVES.items():
        panels[title] = column, read_curves(folder / stage, column, params, targets, missing)
    panels = {title: panel for title, panel in panels.items() if any(len(curve) for seeds in panel[1].values() for curve in seeds)}
    rows = -(-len(panels) // 3)
    figure, axes = plt.subplots(rows, 3, figsize=(WIDTH, 2.9 * rows + 0.4), squeeze=False)
    for axis, (title, (column, lines)) in zip(axes.flat, panels.items(), strict=False):
        draw_curves(axis, column, lines, params.variants)
        axis.set_title(title, fontsize=10)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    handles = [plt.Line2D([], [], color=colour(v, params.variants), lw=2.5) for v in params.variants]
    names = [method_name(v) for v in params.variants]
    figure.legend(handles, names, loc="outside lower center", ncols=5, fontsize=9, columnspacing=1.2)
    return figure


def draw_curves(axis: Axes, column: str, lines: dict[str, list[pd.DataFrame]], variants: list[str]) -> None:
    """Draw the curves {variant: a table for each seed} of one panel."""
    for variant, seeds in lines.items():
        for curve in seeds:
            shade = BLACK if variant == "teacher" else colour(variant, variants)
            axis.plot(curve["epoch"], curve[column], color=shade, lw=1.4, alpha=0.9)
    axis.set_xlabel("epoch")
    axis.set_ylabel(AXES[column])


def read_curves(
    folder: Path, column: str, params: Params, targets: tuple[str, ...], missing: Iterable[tuple[str, str]]
) -> dict[str, list[pd.DataFrame]]:
    """Read a column of a stage's curves, for the variants with one of these targets, but for those that are missing: {variant:
    a table for each seed}."""
    drawn = [variant for variant in params.variants if params.pretrain.ablation[variant].target in targets]
    names = {variant: [f"{variant}-{seed}" for seed in params.seeds] for variant in drawn}
    return {
        variant: [read_curve(folder / f"{name}.csv", column) for name in some if (folder.name, name) not in missing]
        for variant, some in names.items()
    }


def read_curve(path: Path, column: str) -> pd.DataFrame:
    """Read the epochs and a column of one curve, without the points that have no value there. Raises UserError when the file is
    missing."""
    if not path.exists():
        raise UserError(f"{path} is missing: an earlier stage writes it. Run `dvc repro`, which runs the stages in order.")
    return pd.read_csv(path).reindex(columns=["epoch", column]).dropna()
