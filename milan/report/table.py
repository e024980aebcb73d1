"""Write the results table in the paper's layout, as Markdown, CSV and LaTeX.

Our rows are measured on this recipe's data (at demo scale the built-in world). Published numbers and re-runs by others
are measured on ImageNet-1K and ADE20K, and are in separate tables. The sentences about the order of the variants are
derived from the numbers.
"""

import io
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from urllib.parse import quote

import pandas as pd

from milan.report import claims
from milan.report.results import (
    HEADS,
    KINDS,
    METHOD_NAMES,
    PUBLISHED_MEASURES,
    ROBUSTNESS_TITLES,
    TITLES,
    ZERO_SHOT,
    Results,
    method_name,
    name_in_sentence,
    not_run,
    shown,
    title_in_sentence,
    without_number,
)
from milan.report.text import DASH, decimal, in_latex, in_markdown, links_in_markdown, markdown_link, markdown_table

CAPTIONS_CAVEAT = (
    "The CLIP teacher was trained on captions, which name the classes. MILAN and every variant "
    "with a CLIP target use this extra information; MAE and no pretraining do not."
)
NAMES_CAVEAT = (
    "Without pairs/captions.csv the teacher learned from the class names of the training images: "
    "every variant with a CLIP target has then used their labels."
)
TEACHER_SCORES = {"zero-shot": "zero_shot_top1", "linear": "linear_top1", "k-NN": "knn_top1"}
ELSEWHERE = "ImageNet-1K and ADE20K"


def order_sentences(results: Results) -> list[str]:
    """Return sentences on MILAN's lead over the other variants, and on where the order of variants is not the expected one."""
    if results.params.pretrain.weights:
        return []  # one checkpoint is no ablation
    return [*(lead_sentence(results, column) for column in shown(results)), *expected_order_sentences(results)]


def lead_sentence(results: Results, column: str) -> str:
    """Return `MILAN: linear eval 36.9, 26.1 above MAE, 25.2 above no pretraining.`"""
    best = "milan" if "milan" in results.ours.index else results.ours.index[-1]
    value = rounded_means(results, column)
    title = title_in_sentence(results.data.titles[column])
    if pd.isna(value[best]):
        return f"{method_name(best)}: no number for {title}."
    others = [f"{describe_difference(value[best] - value[v])} {name_in_sentence(v)}" for v in results.ours.index if v != best]
    return ", ".join([f"{method_name(best)}: {title} {decimal(value[best])}", *others]) + "."


def rounded_means(results: Results, column: str) -> pd.Series:
    """Return the means as the table prints them, so that sentences and table agree to the last digit."""
    return results.ours[column].map(lambda value: value if pd.isna(value) else float(decimal(value)))


def describe_difference(points: float) -> str:
    """Return `26.1 above`, `26.1 below` or `level with`; `no number for` where the other has none."""
    if pd.isna(points):
        return "no number for"
    if abs(points) < 0.05:
        return "level with"
    return f"{decimal(abs(points))} {'above' if points > 0 else 'below'}"


def expected_order_sentences(results: Results) -> list[str]:
    """Return sentences naming, for each measure, the variants that are not above the one they are built from."""
    chain = [variant for variant in METHOD_NAMES if variant in results.ours.index]
    if len(chain) < 2:
        return []
    order = " < ".join(map(name_in_sentence, chain))
    words = [f"Expected order, as each ingredient of the paper adds to the one before: {order}."]
    for column in shown(results):
        value = rounded_means(results, column)
        if missing := [name_in_sentence(variant) for variant in chain if pd.isna(value[variant])]:
            words.append(f"{results.data.titles[column]}: not known, without a number for {', '.join(missing)}.")
            continue
        exceptions = [not_above(results, column, a, b) for a, b in pairwise(chain) if value[b] <= value[a]]
        finding = f"not in this order, {'; '.join(exceptions)}." if exceptions else "in this order."
        words.append(f"{results.data.titles[column]}: {finding}")
    return words


def not_above(results: Results, column: str, first: str, second: str) -> str:
    """Return `MAE (10.7) is below no pretraining (11.5)`, or `... is level with no pretraining`."""
    a, b = (rounded_means(results, column)[variant] for variant in (first, second))
    relation = (
        f"is below {name_in_sentence(first)} ({decimal(a)}){overlap(results, column, first, second)}"
        if b < a
        else f"is level with {name_in_sentence(first)}"
    )
    return f"{name_in_sentence(second)} ({decimal(b)}) {relation}"


def overlap(results: Results, column: str, first: str, second: str) -> str:
    """Return a clause when the ranges of two variants over seeds overlap; nothing for a single seed."""
    if len(results.params.seeds) < 2:
        return ""
    (low_a, high_a), (low_b, high_b) = (results.ours.loc[v, [f"{column}_low", f"{column}_high"]] for v in (first, second))
    return ", though their ranges over seeds overlap" if max(low_a, low_b) <= min(high_a, high_b) else ""


def notes(results: Results) -> list[str]:
    """Return the sentences that explain our numbers."""
    seeds, n = len(results.params.seeds), results.data.images
    spread = (
        f"Means over {seeds} seeds, the range in brackets" if seeds > 1 else "One seed, so the spread over seeds is not known"
    )
    if results.data.classes:
        error = decimal(50 / n**0.5)
        words = [f"{spread}; the sampling error of a top-1 over {n:,} images is up to {error} points (one standard error)."]
        words.append(labels_note(results))
    else:
        words = [f"{spread}."]
    if stages := not_run(results):
        words.append(f"Not run, so a dash in the table: {', '.join(stages)}.")
    if missing := without_number(results):
        words.append(f"NaN or infinite, so without a mean and a verdict: {'; '.join(missing)}.")
    if "teacher/linear_top1" in results.teacher:
        scores = [f"{name} {decimal(results.teacher[f'teacher/{entry}'])}" for name, entry in TEACHER_SCORES.items()]
        words.append(f"The teacher's own accuracy: {', '.join(scores)}.")
    if results.ours[list(ZERO_SHOT)].notna().any(axis=None):
        words.append(zero_shot_note(results))
    if results.ours["corrupted"].notna().any():
        words.append(corrupted_note(results))
    if "extract_targets/importance_on_object" in results.importance:
        names = ("importance_on_object", "object_area", "importance_above_area")
        on, area, above = (decimal(results.importance[f"extract_targets/{name}"]) for name in names)
        words.append(
            f"{on} % of the teacher's patch importance falls on the object, which covers {area} % of the image; in "
            f"{above} % of the images the first share is larger."
        )
    if results.params.data.imagenet and results.params.teacher.tiny:
        words.append(NAMES_CAVEAT)
    if results.best:
        words.append(f"The table shows the last evaluation; best of the training where it was better: {'; '.join(results.best)}.")
    words += [f"Warning of {doubt}" for doubt in results.doubts]
    if results.edited:
        words.append(f"Trained over an edit of the code, so not by one piece of code: {'; '.join(results.edited)}.")
    return [*words, CAPTIONS_CAVEAT]


def labels_note(results: Results) -> str:
    """Return the sentence that says how many labels each evaluation learned from."""
    params = results.params
    probes, tuning = (f"{100 * section.labels:g} %" for section in (params.linear_eval, params.finetune))
    return (
        f"Of the {results.data.train:,} labels of training images linear evaluation and k-NN had {probes}, the attentive probe "
        f"100 % and fine-tuning {tuning}."
    )


def zero_shot_note(results: Results) -> str:
    """Return the sentence that explains the zero-shot columns."""
    return (
        "Zero-shot: the class whose text is nearest to the class token that the pretrained model predicts, of whole images and "
        f"with {100 * results.params.pretrain.mask_ratio:g} % of the patches masked at random."
    )


def measured_where(results: Results) -> str:
    """Return `at scale demo`, or with real data `on flowers, at scale photos`."""
    data, scale = results.params.data, results.params.scale
    return f"on {data.title}, at scale {scale}" if data.imagenet else f"at scale {scale}"


def corrupted_note(results: Results) -> str:
    """Return the sentence that explains the column of corrupted images."""
    if results.params.data.robustness.imagenet_c:
        return "Corrupted top-1: of the fine-tuned classifier on ImageNet-C, the mean over its 15 corruptions and 5 severities."
    return (
        "Corrupted top-1: of the fine-tuned classifier on validation images that are corrupted in 5 ways and 5 strengths, the mean "
        "over both. It is not divided by AlexNet's error, as ImageNet-C's mCE is: there is no AlexNet for these images."
    )


def heading(results: Results) -> str:
    """Return the heading of our table."""
    caveat = "" if results.params.data.imagenet else ": not comparable with the published numbers"
    return f"Our results on {results.data.name}{caveat}"


def measured_on(results: Results) -> str:
    """Return the sentence on measures and data of our table."""
    data, params = results.data, results.params
    sentences = []
    if data.classes:
        chance = decimal(100 / data.classes)
        sentences.append(f"Top-1 in % over {data.images:,} validation images of {data.classes} classes (chance {chance} %)")
    if data.scenes:
        sentences.append(
            f"mIoU in % over {data.scenes:,} scenes with {data.scene_classes} classes"
            f"{' of the built-in world' if params.data.imagenet and not params.data.ade20k else ''} "
            f"(the most frequent class everywhere: {decimal(data.constant_miou)}, and {decimal(data.constant_pixel_accuracy)} % of the pixels)"
        )
    return "; ".join(sentences) + "."


# Rows.


def our_rows(results: Results, link: Callable[[str, str], str]) -> list[dict[str, str]]:
    """Return the rows of our table as {title: cell}; link(text, path from the repository's root) writes a link."""
    return [our_row(results, variant, link) for variant in results.ours.index]


def our_row(results: Results, variant: str, link: Callable[[str, str], str]) -> dict[str, str]:
    """Return the row of one variant."""
    params, means = results.params, results.ours.loc[variant]
    own = params.pretrain.ablation[variant].target != "none" and not params.pretrain.weights

    def links(path: str) -> str:
        each = [link(str(seed), path.format(seed)) for seed in params.seeds]
        return type(each[0])(", ".join(each))  # Markdown stays Markdown

    return {
        "Algorithm": Path(params.pretrain.weights).name if params.pretrain.weights else method_name(variant),
        "Backbone": params.model.name,
        "Epochs": f"{params.pretrain.epochs:g}" if own else DASH,
        "Batch size": str(params.pretrain.batch_size) if own else DASH,
        **{title: spread_cell(means, column, len(params.seeds)) for column, title in results.data.titles.items()},
        "Recipe": link(params.scale, f"conf/scale/{params.scale}.yaml"),
        "Weights of seed": links(f"outs/{params.data.name}/pretrain/{variant}-{{}}"),
        "Curve of seed": links(f"reports/curves/{params.data.name}/pretrain/{variant}-{{}}.csv") if own else DASH,
    }


def spread_cell(row: pd.Series, column: str, seeds: int) -> str:
    """Return `36.0 (35.0–37.0)`: mean and range over seeds, the mean alone for a single seed."""
    if pd.isna(row[column]):
        return DASH
    mean = decimal(row[column])
    return mean if seeds < 2 else f"{mean} ({decimal(row[f'{column}_low'])}{DASH}{decimal(row[f'{column}_high'])})"


def published_rows(published: pd.DataFrame, kind: str, source: Callable[[str], str]) -> list[dict[str, str]]:
    """Return the rows of one kind as {title: cell}; source(text with URLs) writes the cell of sources."""

    def cell(value) -> str:
        return DASH if pd.isna(value) else str(value)

    return [
        {
            "Algorithm": row.method,
            "Backbone": row.backbone,
            "Epochs": cell(row.epochs),
            "Batch size": cell(row.batch_size),
            "Teacher": row.teacher,
            **{TITLES[column]: decimal(getattr(row, column)) for column in PUBLISHED_MEASURES},
            "Source": source(row.source),
        }
        for row in published[published["kind"] == kind].itertuples()
    ]


# Writers.


def markdown(results: Results) -> str:
    """Return reports/table.md, with links relative to that file."""
    parts = [f"# {in_markdown(f'Results {measured_where(results)}')}", f"## {in_markdown(heading(results))}"]
    rows = our_rows(results, link_from_reports)
    parts += [in_markdown(measured_on(results)), markdown_table(rows), markdown_sentences(results)]
    parts += [
        "![Bars of linear evaluation, fine-tuning, segmentation and dense probe by variant](plots/bars.png)",
        "![Loss curves](plots/curves.png)",
        *robustness_section(results),
        *claims_section(results),
    ]
    for kind, title in KINDS.items():
        parts += [f"## {title}: {ELSEWHERE}, 224 px", markdown_table(published_rows(results.published, kind, links_in_markdown))]
    return "\n\n".join(parts) + "\n"


def markdown_sentences(results: Results) -> str:
    """Return the sentences on the order and those that explain the numbers, as a list in Markdown."""
    return "\n".join(f"- {in_markdown(sentence)}" for sentence in [*order_sentences(results), *notes(results)])


def claims_section(results: Results) -> list[str]:
    """Return the paragraphs on the paper's claims; none without a claim's two variants."""
    notes, rows = claims.notes(results), claims.rows(results)
    table = [markdown_table(rows)] if rows else []
    return [f"### {in_markdown(claims.heading(results))}", *notes[:1], *table, *notes[1:]] if notes else []


def robustness_section(results: Results) -> list[str]:
    """Return the paragraphs on robustness; none where it was not measured."""
    if results.robustness.empty:
        return []
    rows = [
        {"Algorithm": method_name(variant), "Head": HEADS[head]} | {robustness_title(name): decimal(value) for name, value in row.items()}
        for (variant, head), row in results.robustness.iterrows()
    ]
    said = "Top-1 in %, means over seeds. Of ImageNet-A and -R among their 200 classes. mCE: error by AlexNet's, over 15 corruptions."
    return ["### Robustness", said, markdown_table(rows)]


def robustness_title(name: str) -> str:
    return ROBUSTNESS_TITLES.get(name, name.removesuffix("_top1").replace("_", " ").capitalize())


def link_from_reports(text: str, path: str) -> str:
    """Return a link in reports/table.md to a path from the repository's root."""
    return markdown_link(text, quote(path.removeprefix("reports/") if path.startswith("reports/") else f"../{path}"))


def all_rows(results: Results) -> pd.DataFrame:
    """Return our rows, then published ones and re-runs, as numbers; the columns `kind` and `data` tell them apart."""
    titles = {"Algorithm": "method", "Backbone": "backbone", "Epochs": "epochs", "Batch size": "batch_size"}
    paths = {"Recipe": "recipe", "Weights of seed": "weights", "Curve of seed": "curve"}
    rows = pd.DataFrame(our_rows(results, lambda text, path: path)).rename(columns={**titles, **paths})[
        [*titles.values(), *paths.values()]
    ]
    ours = pd.concat([rows.replace(DASH, ""), results.ours.reset_index()], axis=1)
    ours = ours.assign(kind="ours", data=results.data.name, seeds=len(results.params.seeds))
    theirs = results.published.assign(data=ELSEWHERE)
    both = pd.concat([ours.astype(object), theirs.astype(object)], ignore_index=True)
    first = ["kind", "data", "method", "variant", "backbone", "epochs", "batch_size", "teacher", *TITLES]
    return both[[*first, *(name for name in both.columns if name not in first)]]


def csv(results: Results) -> str:
    """Return reports/table.csv."""
    buffer = io.StringIO()
    all_rows(results).to_csv(buffer, index=False, lineterminator="\n")
    return buffer.getvalue()


def latex(results: Results) -> str:
    """Return reports/table.tex: a float for each table (booktabs), without links."""
    without = ("Recipe", "Weights of seed", "Curve of seed", "Source")
    tables = [(f"{heading(results)}. {measured_on(results)}", our_rows(results, lambda text, path: text))]
    tables += [(f"{title}: {ELSEWHERE}, 224 px", published_rows(results.published, kind, str)) for kind, title in KINDS.items()]
    return "\n".join(
        latex_table(caption, [{title: cell for title, cell in row.items() if title not in without} for row in rows])
        for caption, rows in tables
    )


def latex_table(caption: str, rows: list[dict[str, str]]) -> str:
    """Return one float of rows {title: cell}."""
    titles = list(rows[0])
    columns = "".join(
        "r" if title in (*TITLES.values(), "Epochs", "Batch size") or title.endswith("mIoU") else "l" for title in titles
    )
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{in_latex(caption)}}}", rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
    body = [" & ".join(map(in_latex, cells)) + r" \\" for cells in (titles, *(row.values() for row in rows))]
    return "\n".join([*lines, body[0], r"\midrule", *body[1:], r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])
