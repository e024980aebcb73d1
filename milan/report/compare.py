"""Compare the pretrained models of a scale side by side, from MLflow: differences of their recipes, and results.

Notebook 1 shows the table; `mlflow ui` compares the same runs with their curves.
"""

import pandas as pd

from milan.report.results import MEASURES, OPTIONAL, TITLES
from milan.report.text import DASH, decimal, in_markdown, markdown_table
from milan.tracking.runs import first_line, open_store

MOST = 30  # rows, the newest
SECONDS = "wall_seconds"
NO_RECIPE = ("runtime.", "scale", "seeds", "variants")  # keys that do not change a model


def pretrained_models(client, scale: str) -> pd.DataFrame:
    """Return one row per pretrained model, newest first: name, minutes of pretraining, its results, and the keys of the recipe
    that differ between rows. Empty without such a model."""
    experiment = client.get_experiment_by_name(f"milan-{scale}")
    if experiment is None:
        return pd.DataFrame()
    here = [experiment.experiment_id]
    runs = {run.info.run_id: run for run in client.search_runs(here, "tags.stage = 'pretrain'")}
    models = [model for model in client.search_logged_models(here) if model.source_run_id in runs]
    frame = pd.DataFrame([row_of(model, runs[model.source_run_id]) for model in models[:MOST]])
    same = [name for name in frame if name.startswith("-S ") and frame[name].nunique(dropna=False) == 1]
    return frame.drop(columns=same)


def row_of(model, run) -> dict:
    metrics = {metric.key: metric.value for metric in model.metrics or []}
    recipe = {f"-S {key}": value for key, value in run.data.params.items() if not key.startswith(NO_RECIPE)}
    measured = {**MEASURES, **OPTIONAL}
    minutes = {"minutes": run.data.metrics[SECONDS] / 60} if SECONDS in run.data.metrics else {}
    return {
        "model": model.name,
        **minutes,
        **{title: metrics.get(measured[column][1]) for column, title in TITLES.items()},
        **recipe,
    }


def markdown(scale: str) -> str:
    """Return the table in Markdown, or a sentence that gives the reason why there is none."""
    try:
        frame = pretrained_models(open_store(), scale)
    except Exception as error:  # whatever ails the store: its server, its address, its file
        return in_markdown(f"MLflow's store cannot be read ({first_line(error)}), so no runs are compared here.")
    if frame.empty:
        return in_markdown(f"MLflow has no pretrained model of the experiment milan-{scale} yet.")
    return markdown_table([{name: shown(value) for name, value in row.items()} for row in frame.to_dict("records")])


def shown(value) -> str:
    if isinstance(value, float):
        return decimal(value)
    return DASH if value is None else str(value)
