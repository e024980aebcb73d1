"""The table: our rows in the paper's layout, beside the published numbers and never among them.

Our rows are of this recipe's data (at demo scale the built-in world, which nothing published was measured on);
published numbers and re-runs by others are ImageNet-1K and ADE20K figures, in tables of their own. What the text
says about the order of the variants is worked out from the numbers.
"""

import io
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pandas as pd

from milan.report import claims
from milan.report.results import KINDS, METHODS, TITLES, ZERO_SHOT, Results, in_words, method

CAPTIONS_CAVEAT = (
    "The CLIP teacher was trained on captions, which speak of the very things to be recognised. MILAN and every variant "
    "with a CLIP target draw on that extra information; MAE and no pretraining do not."
)
NAMES_CAVEAT = (
    "Where the images came without pairs/captions.csv, the teacher learned from the class names of the training images: "
    "every variant with a CLIP target has then seen their labels."
)
TEACHER = {"zero-shot": "zero_shot_top1", "linear": "linear_top1", "k-NN": "knn_top1"}
ELSEWHERE = "ImageNet-1K and ADE20K"
DASH = "–"
URL = re.compile(r"https?://[^\s;,]+")


def order_said(r: Results) -> list[str]:
    """What the numbers say: how far the last ingredient gets, and where the order is not the one to expect."""
    if r.params.pretrain.weights:
        return []  # one checkpoint is no ablation
    return [*(lead_said(r, column) for column in ("linear", "finetune", "miou")), *expected_order_said(r)]


def lead_said(r: Results, column: str) -> str:
    """`MILAN: linear eval 36.9, 26.1 above MAE, 25.2 above no pretraining.`"""
    best = "milan" if "milan" in r.ours.index else r.ours.index[-1]
    value = as_shown(r, column)
    others = [f"{difference(value[best] - value[v])} {in_words(v)}" for v in r.ours.index if v != best]
    return f"{method(best)}: {lower(r.data.titles[column])} {value[best]:.1f}" + "".join(f", {words}" for words in others) + "."


def as_shown(r: Results, column: str) -> pd.Series:
    """The means rounded as the table prints them, so that sentences and table agree to the last digit."""
    return r.ours[column].map(lambda value: float(f"{value:.1f}"))


def lower(title: str) -> str:
    """A column's title inside a sentence."""
    return title if title.startswith("ADE20K") else title[0].lower() + title[1:]


def difference(points: float) -> str:
    if abs(points) < 0.05:
        return "level with"
    return f"{abs(points):.1f} {'above' if points > 0 else 'below'}"


def expected_order_said(r: Results) -> list[str]:
    """Where a variant is not above the one that the paper builds it from, as far as the table's digits tell."""
    chain = [variant for variant in METHODS if variant in r.ours.index]
    if len(chain) < 2:
        return []
    words = [f"The order to expect, each ingredient of the paper adding to the one before: {' < '.join(map(in_words, chain))}."]
    for column in ("linear", "finetune", "miou"):
        value = as_shown(r, column)
        said = [not_above(r, column, a, b) for a, b in pairwise(chain) if value[b] <= value[a]]
        words.append(f"{r.data.titles[column]}: " + (f"not that order, {'; '.join(said)}." if said else "this order."))
    return words


def not_above(r: Results, column: str, first: str, second: str) -> str:
    """`MAE (10.7) is below no pretraining (11.5)`, or `is level with`."""
    a, b = (as_shown(r, column)[variant] for variant in (first, second))
    relation = (
        f"is below {in_words(first)} ({a:.1f}){overlap(r, column, first, second)}"
        if b < a
        else f"is level with {in_words(first)}"
    )
    return f"{in_words(second)} ({b:.1f}) {relation}"


def overlap(r: Results, column: str, first: str, second: str) -> str:
    """Whether a difference is more than chance: only seeds can tell."""
    if len(r.params.seeds) < 2:
        return ""
    (low_a, high_a), (low_b, high_b) = (r.ours.loc[v, [f"{column}_low", f"{column}_high"]] for v in (first, second))
    return ", though their ranges over seeds overlap" if max(low_a, low_b) <= min(high_a, high_b) else ""


def notes(r: Results) -> list[str]:
    """What a reader has to know to read our numbers."""
    seeds, n = len(r.params.seeds), r.data.images
    spread = (
        f"Means over {seeds} seeds, the range in brackets" if seeds > 1 else "One seed, so the spread over seeds is not known"
    )
    words = [f"{spread}; the sampling error of a top-1 over {n:,} images is up to {50 / n**0.5:.1f} points (one standard error)."]
    if "teacher/linear_top1" in r.teacher:
        scores = [f"{name} {r.teacher[f'teacher/{entry}']:.1f}" for name, entry in TEACHER.items()]
        words.append(f"The teacher itself: {', '.join(scores)}.")
    if r.ours[list(ZERO_SHOT)].notna().any(axis=None):
        words.append(zero_shot_said(r))
    if "extract_targets/importance_on_object" in r.importance:
        names = ("importance_on_object", "object_area", "importance_above_area")
        on, area, above = (r.importance[f"extract_targets/{name}"] for name in names)
        words.append(
            f"{on:.1f} % of the teacher's patch importance falls on the object, which covers {area:.1f} % of the image; the "
            f"first share is the larger one in {above:.1f} % of the images."
        )
    if r.params.data.imagenet and r.params.teacher.tiny:
        words.append(NAMES_CAVEAT)
    return [*words, CAPTIONS_CAVEAT]


def zero_shot_said(r: Results) -> str:
    return (
        "Zero-shot: the pretrained model's own prediction of the teacher's class token, beside the teacher's texts of the class "
        f"names, of whole images and with {100 * r.params.pretrain.mask_ratio:g} % of the patches masked at random."
    )


def heading(r: Results) -> str:
    return f"Ours, on {r.data.name}" + ("" if r.params.data.imagenet else ": not comparable with the published numbers")


def measured(r: Results) -> str:
    d = r.data
    return (
        f"Top-1 in % over {d.images:,} validation images of {d.classes} classes (chance {100 / d.classes:.1f} %); "
        f"mIoU in % over {d.scenes:,} scenes with {d.scene_classes} classes"
        f"{' of the built-in world' if r.params.data.imagenet and not r.params.data.ade20k else ''}."
    )


# ------------------------------------------------------------------------------------------------------------------- rows


def our_rows(r: Results, link: Callable[[str, str], str]) -> list[dict[str, str]]:
    """Cells of our table; link(text, path from the repository's root) spells a link."""
    return [our_row(r, variant, link) for variant in r.ours.index]


def our_row(r: Results, variant: str, link: Callable[[str, str], str]) -> dict[str, str]:
    p, trained = r.params, r.params.pretrain.ablation[variant].target != "none"
    own = trained and not p.pretrain.weights

    def links(path: str) -> str:
        return ", ".join(link(str(s), path.format(s)) for s in p.seeds)

    return {
        "Algorithm": Path(p.pretrain.weights).name if p.pretrain.weights else method(variant),
        "Backbone": p.model.name,
        "Epochs": f"{p.pretrain.epochs:g}" if own else DASH,
        "Batch size": str(p.pretrain.batch_size) if own else DASH,
        **{title: spread_cell(r.ours.loc[variant], column, len(p.seeds)) for column, title in r.data.titles.items()},
        "Recipe": link(p.scale, f"conf/scale/{p.scale}.yaml"),
        "Weights of seed": links(f"outs/{p.scale}/pretrain/{variant}-{{}}"),
        "Curve of seed": links(f"reports/curves/{p.scale}/pretrain/{variant}-{{}}.csv") if own else DASH,
    }


def spread_cell(row: pd.Series, column: str, seeds: int) -> str:
    if pd.isna(row[column]):
        return DASH
    mean = f"{row[column]:.1f}"
    return mean if seeds < 2 else f"{mean} ({row[f'{column}_low']:.1f}{DASH}{row[f'{column}_high']:.1f})"


def published_rows(published: pd.DataFrame, kind: str, source: Callable[[str], str]) -> list[dict[str, str]]:
    """Cells of one kind's table; source(text with URLs) spells where a row comes from."""

    def cell(value, spec: str = "") -> str:
        return DASH if pd.isna(value) else format(value, spec)

    return [
        {
            "Algorithm": row.method,
            "Backbone": row.backbone,
            "Epochs": cell(row.epochs),
            "Batch size": cell(row.batch_size),
            "Teacher": row.teacher,
            **{TITLES[column]: cell(getattr(row, column), ".1f") for column in ("linear", "finetune", "miou")},
            "Source": source(row.source),
        }
        for row in published[published["kind"] == kind].itertuples()
    ]


# ---------------------------------------------------------------------------------------------------------------- writers


def markdown(r: Results) -> str:
    """reports/table.md, its links relative to that file."""
    parts = [f"# Results at scale {r.params.scale}", f"## {heading(r)}", measured(r), markdown_table(our_rows(r, markdown_link))]
    parts += ["\n".join(f"- {sentence}" for sentence in [*order_said(r), *notes(r)])]
    parts += [
        "![Bars of linear evaluation, fine-tuning and segmentation by variant](plots/bars.png)",
        "![Loss curves](plots/curves.png)",
        *claims_section(r),
    ]
    for kind, title in KINDS.items():
        parts += [f"## {title}: {ELSEWHERE}, 224 px", markdown_table(published_rows(r.published, kind, markdown_source))]
    return "\n\n".join(parts) + "\n"


def claims_section(r: Results) -> list[str]:
    """Paragraphs; none where no claim's two variants were run."""
    said, rows = claims.notes(r), claims.rows(r)
    table = [markdown_table(rows)] if rows else []
    return [f"### {claims.heading(r)}", *said[:1], *table, *said[1:]] if said else []


def markdown_table(rows: list[dict[str, str]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def markdown_link(text: str, path: str) -> str:
    return f"[{text}]({path.removeprefix('reports/') if path.startswith('reports/') else f'../{path}'})"


def markdown_source(text: str) -> str:
    return URL.sub(lambda url: f"[{url[0].split('/')[2]}]({url[0]})", text)


def frame(r: Results) -> pd.DataFrame:
    """All rows as numbers: ours first; `kind` and `data` say which is which."""
    titles = {"Algorithm": "method", "Backbone": "backbone", "Epochs": "epochs", "Batch size": "batch_size"}
    paths = {"Recipe": "recipe", "Weights of seed": "weights", "Curve of seed": "curve"}
    rows = pd.DataFrame(our_rows(r, lambda text, path: path)).rename(columns={**titles, **paths})[
        [*titles.values(), *paths.values()]
    ]
    ours = pd.concat([rows.replace(DASH, ""), r.ours.reset_index()], axis=1)
    ours = ours.assign(kind="ours", data=r.data.name, seeds=len(r.params.seeds))
    theirs = r.published.assign(data=ELSEWHERE)
    both = pd.concat([ours.astype(object), theirs.astype(object)], ignore_index=True)
    first = ["kind", "data", "method", "variant", "backbone", "epochs", "batch_size", "teacher", *TITLES]
    return both[[*first, *(name for name in both.columns if name not in first)]]


def csv(r: Results) -> str:
    buffer = io.StringIO()
    frame(r).to_csv(buffer, index=False, lineterminator="\n")
    return buffer.getvalue()


def latex(r: Results) -> str:
    """Two or three floats for a paper (booktabs), without links."""
    without = ("Recipe", "Weights of seed", "Curve of seed", "Source")
    tables = [(f"{heading(r)}. {measured(r)}", our_rows(r, lambda text, path: text))]
    tables += [(f"{title}: {ELSEWHERE}, 224 px", published_rows(r.published, kind, str)) for kind, title in KINDS.items()]
    return "\n".join(
        latex_table(title, [{k: v for k, v in row.items() if k not in without} for row in rows]) for title, rows in tables
    )


def latex_table(caption: str, rows: list[dict[str, str]]) -> str:
    titles = list(rows[0])
    columns = "".join(
        "r" if title in (*TITLES.values(), "Epochs", "Batch size") or title.endswith("mIoU") else "l" for title in titles
    )
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{escaped(caption)}}}", rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
    body = [" & ".join(map(escaped, cells)) + r" \\" for cells in (titles, *(row.values() for row in rows))]
    return "\n".join([*lines, body[0], r"\midrule", *body[1:], r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def escaped(text: str) -> str:
    return re.sub(r"([%&_#$])", r"\\\1", text).replace(DASH, "--")
