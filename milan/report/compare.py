"""Compare results side by side: those of this folder, of DVC's experiments and of commits, by what git keeps of them.

    python -m milan.report.compare    # or make compare

prints a row per result: its data, its scale, the settings that differ from the scale's recipe in conf/scale, and of each
measure MILAN's score and the best of the others'. For notebook 1, pretrained models of a scale from MLflow, with the
differences of their recipes; `mlflow ui` compares the same runs with their curves.
"""

import functools
import io
import re
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from milan.core.errors import UserError
from milan.core.files import explain_os_errors
from milan.core.identity import flatten
from milan.core.program import fail
from milan.core.repository import git
from milan.params import changed_settings, say_settings
from milan.report.results import ALL_MEASURES, FREE, SHOWN, TITLES
from milan.report.text import DASH, aligned, decimal, in_markdown, markdown_table
from milan.tracking.runs import first_line, open_store, parse_yaml

FILES = ("params.yaml", "reports/table.csv")  # of a result: its recipe and its numbers
EXPERIMENT = re.compile(r"refs/exps/[0-9a-f]{2}/[0-9a-f]{38}/(.+)")  # where DVC keeps an experiment of a commit
LEGEND = "Each cell: MILAN / the best other variant run here, means over the seeds, in %. Changed: against conf/scale."
COLUMNS = {**{column: TITLES[column] for column in SHOWN}, "miou": "mIoU"}
MOST = 30  # rows, the newest
SECONDS = "wall_seconds"


def pretrained_models(client, name: str) -> pd.DataFrame:
    """Return one row per pretrained model, newest first: name, minutes of pretraining, its results, and the keys of the recipe
    that differ between rows. Empty without such a model."""
    experiment = client.get_experiment_by_name(f"milan-{name}")
    if experiment is None:
        return pd.DataFrame()
    here = [experiment.experiment_id]
    runs = {run.info.run_id: run for run in client.search_runs(here, "tags.stage = 'pretrain'")}
    whole = {run.info.run_id: run for run in client.search_runs(here, "tags.pipeline LIKE '%'")}
    models = [model for model in client.search_logged_models(here) if model.source_run_id in runs]
    frame = pd.DataFrame([row_of(model, runs[model.source_run_id], whole) for model in models[:MOST]])
    same = [name for name in frame if name.startswith("-S ") and frame[name].nunique(dropna=False) == 1]
    return frame.drop(columns=same)


def row_of(model, run, whole: dict) -> dict:
    """Return the row of a model that a run made. whole: {id: run} of pipelines, whose settings the run's own are a part of."""
    metrics = {metric.key: metric.value for metric in model.metrics or []}
    parent = whole.get(run.data.tags.get("mlflow.parentRunId"))
    settings = {**(parent.data.params if parent else {}), **run.data.params}
    recipe = {f"-S {key}": value for key, value in settings.items() if not key.startswith((*FREE, "seed", "variant"))}
    minutes = {"minutes": run.data.metrics[SECONDS] / 60} if SECONDS in run.data.metrics else {}
    return {
        "model": model.name,
        **minutes,
        **{title: metrics.get(ALL_MEASURES[column][1]) for column, title in TITLES.items()},
        **recipe,
    }


def markdown(name: str) -> str:
    """Return the table in Markdown, or a sentence that gives the reason why there is none."""
    try:
        frame = pretrained_models(open_store(), name)
    except Exception as error:  # whatever ails the store: its server, its address, its file
        return in_markdown(f"MLflow's store cannot be read ({first_line(error)}), so no runs are compared here.")
    if frame.empty:
        return in_markdown(f"MLflow has no pretrained model of the experiment milan-{name} yet.")
    return markdown_table([{name: shown(value) for name, value in row.items()} for row in frame.to_dict("records")])


def shown(value) -> str:
    if isinstance(value, float):
        return decimal(value)
    return DASH if value is None else str(value)


def kept_results() -> Iterator[tuple[str, str, str, str]]:
    """Yield (name, date, recipe, table) of each result, the texts of FILES: of this folder, then of DVC's experiments and of the
    commits that changed the table, newest first. Raises UserError where git knows no repository."""
    if git("rev-parse").returncode:
        raise UserError("git knows no repository here, and so no commits and experiments to compare: take a git clone.")
    texts = [Path(name).read_text(encoding="utf-8") for name in FILES if Path(name).is_file()]
    if len(texts) == len(FILES):
        yield "this folder", "", *texts
    refs = git("for-each-ref", "--sort=-committerdate", "--format=%(objectname)%09%(refname)%09%(committerdate:short)", "refs/exps")
    listed = [line.split("\t") for line in refs.stdout.splitlines()]
    experiments = [(rev, name[1], date) for rev, ref, date in listed if (name := EXPERIMENT.fullmatch(ref))]
    log = git("log", f"-{MOST}", "--format=%H%x09%h%x09%cs", "--", FILES[1])
    for rev, name, date in (*experiments, *(line.split("\t") for line in log.stdout.splitlines())):
        asked = [git("show", f"{rev}:{path}") for path in FILES]
        if not any(each.returncode for each in asked):
            yield name, date, *(each.stdout for each in asked)


@functools.cache
def read_recipe(text: str) -> tuple[dict, dict]:
    """Return the settings of a recipe, {dotted key: value}, and those that its scale's recipe has otherwise, but for the data."""
    settings = flatten(parse_yaml(text))
    return settings, {key: value for key, value in changed_settings(settings).items() if not key.startswith("data.")}


def result_row(name: str, date: str, recipe: str, table: str) -> dict[str, str]:
    """Return the row of a result: {title: cell}."""
    settings, changed = read_recipe(recipe)
    results = pd.read_csv(io.StringIO(table)).reindex(columns=["kind", "variant", *SHOWN])
    ours = results[results.kind == "ours"].set_index("variant")[list(SHOWN)]
    milan, others = ours.reindex(["milan"]).iloc[0], ours.drop("milan", errors="ignore").max()
    images = settings.get("data.imagenet")
    return {
        "result": name,
        "date": date,
        "data": (settings.get("data.name") or Path(images).name) if images else "built-in world",
        "scale": str(settings.get("scale")),
        "changed": say_settings(changed, settings) or DASH,
        **{title: f"{decimal(milan[column])} / {decimal(others[column])}" for column, title in COLUMNS.items()},
    }


def result_table() -> str:
    """Return the table of the newest results as text; a result with several names has a row for the last of them."""
    rows = {(recipe, table): result_row(name, date, recipe, table) for name, date, recipe, table in kept_results()}
    if not rows:
        raise UserError(f"There is no result here yet: {FILES[1]} is in no commit. Run `dvc repro` first.")
    shown_rows = list(rows.values())[:MOST]
    return f"{aligned([list(shown_rows[0]), *(list(row.values()) for row in shown_rows)])}\n\n{LEGEND}"


def main() -> None:
    try:
        with explain_os_errors():
            print(result_table())
    except UserError as error:
        fail(str(error))


if __name__ == "__main__":
    main()
