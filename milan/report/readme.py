"""Write the results table of README.md from the committed reports, between its two markers.

    python -m milan.report.readme

Sources: reports/table.csv (the report stage), the seeds study at scale demo_gpu, the verdicts of both seeds studies, and
the cost of the paper's recipe (`python -m milan.plan --scale paper --card H100 > reports/plan/paper.txt`).
"""

from pathlib import Path

import pandas as pd

from milan.core.errors import UserError
from milan.core.files import explain_os_errors, write_whole
from milan.core.program import fail
from milan.report.results import KINDS, TITLES, method_name
from milan.report.table import ELSEWHERE
from milan.report.text import Markdown, decimal, in_markdown, markdown_table

README = Path("README.md")
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
TABLE, PLAN = Path("reports/table.csv"), Path("reports/plan/paper.txt")
STUDIES = {"demo": Path("reports/evidence/seeds"), "demo_gpu": Path("reports/evidence/demo_gpu/seeds")}
COLUMNS = {column: TITLES[column] for column in ("linear", "knn", "attentive", "finetune", "corrupted")}
COLUMNS |= {"miou": "mIoU", "dense": TITLES["dense"]}
SOURCES = "Top-1 and mIoU in %; a dash: not measured or not published. [All measures and all sources](reports/table.md)."


def main() -> None:
    try:
        with explain_os_errors():
            write_whole(README, replace(present(README).read_text(encoding="utf-8"), render()).encode())
    except UserError as error:
        fail(str(error))
    print(f"{README}: results of {TABLE} and {', '.join(map(str, STUDIES.values()))}")


def render() -> str:
    """Return the table in Markdown and one sentence on the verdicts, from the reports in the current folder."""
    results = pd.read_csv(present(TABLE), dtype={"seeds": "Int64"})
    ours, others = results[results.kind == "ours"], results[results.kind != "ours"]
    rows = [] if scale_of(ours) == "paper" else [planned_row(present(PLAN).read_text(encoding="utf-8"))]
    others = others[others.method.str.contains("MILAN")].groupby("kind", sort=False).head(1)
    rows += [row(run.method, run.data, run, KINDS[run.kind].lower()) for run in others.itertuples()]
    data = Markdown(f"{in_markdown(ours.data.iloc[0])}, `{scale_of(ours)}`")
    rows += [row(run.method, data, run, seeds(run.seeds)) for run in ours.itertuples()]
    larger = pd.read_csv(present(STUDIES["demo_gpu"] / "table.csv"))
    status = seeds(larger.seed.nunique())
    # A mean counts only with all its seeds.
    means = larger.reindex(columns=["variant", *COLUMNS]).groupby("variant", sort=False).agg(lambda values: values.mean(skipna=False))
    rows += [row(method_name(run.Index), Markdown("the built-in world, `demo_gpu`"), run, status) for run in means.itertuples()]
    return f"{markdown_table(rows)}\n\n{SOURCES} {verdicts()}"


def planned_row(plan: str) -> dict[str, str]:
    """Return the row of the paper's own recipe, which has no results: its status and its cost by milan.plan's text."""
    head = plan.splitlines()[0]
    hours = next(line for line in plan.splitlines() if line.startswith("all ")).split()[1:]
    device = head.rpartition(" px, ")[2]
    cost = f"[planned]({PLAN}): {hours[0]} hours on 1 GPU or {hours[1]} on 8 for all stages, {device}"
    published = "the release reports 39 hours on 8 A100 for pretraining alone"
    return row("MILAN, this code", Markdown(f"{ELSEWHERE}, `paper`"), None, Markdown(f"**not run here**; {cost}; {published}"))


def row(name: str, data: str, run: tuple | None, status: str) -> dict[str, str]:
    values = {title: getattr(run, column, float("nan")) for column, title in COLUMNS.items()}
    return {"Method": name, "Data, scale": data, **{title: decimal(value) for title, value in values.items()}, "Status": status}


def scale_of(ours: pd.DataFrame) -> str:
    return Path(ours.recipe.iloc[0]).stem


def seeds(count: int) -> str:
    return f"run here, {count} seed{'s' if count > 1 else ''}"


def verdicts() -> str:
    """Return one sentence: how many of the paper's claims each seeds study supports."""
    counts, measures = [], 0
    for scale, folder in STUDIES.items():
        claims = pd.read_csv(present(folder / "claims.csv"))
        verdict, measures = claims.verdict, max(measures, claims.measure.nunique())
        supported, refuted = (verdict == "supported").sum(), (verdict == "not supported").sum()
        counts.append(f"`{scale}` supports {supported} of {len(verdict)} and contradicts {refuted} ([table]({folder}/table.md))")
    return f"The paper makes five claims, each judged in up to {measures} measures by studies over three seeds: {'; '.join(counts)}."


def replace(text: str, content: str) -> str:
    """Return text with the content between the markers replaced. Raises UserError where the markers are not there once each."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        raise UserError(f"{README} must hold the lines {BEGIN} and {END} once each, in this order: put them back.")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{content}\n{END}{rest.split(END)[1]}"


def present(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"{path} is missing: it is in git. Run this in the project's folder, or git checkout -- {path}.")
    return path


if __name__ == "__main__":
    main()
