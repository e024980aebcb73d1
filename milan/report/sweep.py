"""Write the table and the figure of a sweep: DVC's experiments on this commit that differ in one key of the recipe.

    dvc exp run --queue -S 'pretrain.mask_ratio=0.5,0.65,0.75,0.9'    # a decoder study: -S model.decoder.depth=1,2,4
    dvc exp run --run-all
    python -m milan.report.sweep pretrain.mask_ratio

Writes table.md, table.csv and figure.png to reports/sweeps/<key>/, and for every experiment its params.yaml and dvc.lock;
may be repeated as experiments come in. The commit's own results are a point too. Experiments that differ in other keys,
except variants, seeds and runtime, are left out and named. The costs of the target bank and of pretraining stand beside the
results, where MLflow and dvc.lock have them.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import yaml

from milan.core import repository
from milan.core.errors import UserError, nearest
from milan.core.files import write_whole
from milan.core.identity import flatten
from milan.core.program import fail
from milan.report import costs, plots
from milan.report.costs import COSTS
from milan.report.plots import Figure, plt
from milan.report.provenance import StageRun
from milan.report.results import ALL_MEASURES, FREE, MEASURES, OPTIONAL, TITLES, method_name
from milan.report.text import DASH, decimal, in_markdown, markdown_table
from milan.tracking.runs import parse_yaml, recipe_stages

DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
HERE = "this commit"
AFTER = ("report", "figures", "page")  # the evaluations: an experiment may have left these as its commit had them
TITLES = {**TITLES, "miou": "mIoU"}


class Experiment(NamedTuple):
    """An experiment as DVC and git keep it."""

    name: str
    recipe: dict  # params.yaml
    metrics: dict[str, dict]  # by path below the data's folder, such as linear_eval/milan-0.json
    lock: dict  # the stages of dvc.lock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("key", help="the key that was varied, such as pretrain.mask_ratio")
    parser.add_argument("--out", type=Path, default=Path("reports/sweeps"), help="default: %(default)s")
    args = parser.parse_args()
    try:
        experiments = read_experiments()
        sweep, _ = members(args.key, experiments)
        write(args.key, experiments, costs.known_runs({experiment.recipe["data"]["name"] for experiment in sweep}), args.out / args.key)
    except UserError as error:
        fail(str(error))


def write(key: str, experiments: list[Experiment], known: list[StageRun], out: Path, about: str = "") -> None:
    """Write the sweep's files to out. known: MLflow's runs; about: a paragraph above the tables. Raises UserError unless two
    values of the key have results."""
    sweep, others = members(key, experiments)
    runs = rows(key, sweep, known)
    if runs.empty:
        raise UserError(
            f"{key}: results of at least two values are needed; DVC has {len(experiments) - 1} experiment(s) on this commit "
            f"(`dvc exp show`). Run some: dvc exp run --queue -S '{key}=ONE,OTHER' && dvc exp run --run-all"
        )
    used = [e for e in sweep if e.name in set(runs["experiment"])]
    origin = costs.said([e.lock for e in used], known)
    write_whole(out / "table.csv", runs.round(2).to_csv(index=False, lineterminator="\n").encode())
    write_whole(out / "table.md", markdown(key, sweep[0].recipe["scale"], runs, about, origin).encode())
    plots.save(draw(key, runs), out / "figure.png")
    for experiment in used:
        if experiment.name != HERE:
            keep(out / experiment.name, experiment)
    left = f"; no part of this sweep: {', '.join(e.name for e in others)}" if others else ""
    print(f"{out / 'table.md'}: {runs['value'].nunique()} values, {runs['variant'].nunique()} variant(s){left}", flush=True)


def keep(folder: Path, experiment: Experiment) -> None:
    """Write the recipe and the lock of an experiment: with these two in place, `dvc repro` makes its results again."""
    for name, tree in {"params.yaml": experiment.recipe, "dvc.lock": {"schema": "2.0", "stages": experiment.lock}}.items():
        write_whole(folder / name, yaml.dump(tree, Dumper=DUMPER, sort_keys=False).encode())


# ------------------------------------------------------------------------------------------------------- from git and DVC


def read_experiments() -> list[Experiment]:
    """Return this commit's results and those of DVC's finished experiments on it, the oldest first."""
    repository.refuse_lost_experiments()
    _, commit = json.loads(dvc("exp", "show", "--json", capture_output=True, text=True).stdout)
    done = [made for made in commit["experiments"] or [] if (made["executor"] or {}).get("state", "success") == "success"]
    states = [(made["name"], made["revs"][0]) for made in done]
    states.sort(key=lambda state: state[1]["data"]["timestamp"])
    return [read_experiment(name, state) for name, state in [(HERE, commit), *states]]


def read_experiment(name: str, state: dict) -> Experiment:
    """state: an entry of `dvc exp show --json`. Without dvc.lock, before a first run, the lock is empty."""
    if not state["data"]:
        raise UserError(f"DVC cannot read {name}: {state['error']['msg']}")
    recipe = state["data"]["params"]["params.yaml"]["data"]
    folder = f"reports/metrics/{recipe['data']['name']}"
    metrics = {os.path.relpath(path, folder): file["data"] for path, file in state["data"]["metrics"].items() if "data" in file}
    held = git("ls-tree", "--name-only", state["rev"], "dvc.lock")
    return Experiment(name, recipe, metrics, read_lock(git("show", f"{state['rev']}:./dvc.lock") if held else "", recipe))


def read_lock(text: str, recipe: dict) -> dict:
    """Return the stages of a dvc.lock that made the recipe's numbers."""
    stages = recipe_stages(parse_yaml(text).get("stages", {}), recipe["variants"], recipe["seeds"])
    return {name: entry for name, entry in stages.items() if name not in AFTER}


def dvc(*words: str, **options) -> subprocess.CompletedProcess:
    """Run DVC, with this interpreter for its stages. Raises UserError when it fails."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    done = subprocess.run([sys.executable, "-m", "dvc", *words], env={**os.environ, "PATH": path}, **options)
    if done.returncode:
        raise UserError(
            f"dvc {' '.join(words)} ended with status {done.returncode}; {done.stderr or 'its message stands above'}. "
            "What is finished is kept: mend the cause and type the same command again."
        )
    return done


def git(*words: str) -> str:
    """Run git and return its output. Raises UserError when it fails."""
    done = repository.git(*words)
    if done.returncode:
        raise UserError(f"git {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


# -------------------------------------------------------------------------------------------------------------- the sweep


def members(key: str, experiments: list[Experiment]) -> tuple[list[Experiment], list[Experiment]]:
    """Return the experiments that differ in the key alone, and the others. Of several such groups the largest counts, of
    equally large ones the newest."""
    groups: dict[str, list[Experiment]] = {}
    for experiment in experiments:
        flat = flatten(experiment.recipe)
        if key not in flat:
            raise UserError(f"{key}: the recipe has no such key{nearest(key, flat)}")
        rest = {name: value for name, value in flat.items() if name != key and not name.startswith(FREE)}
        groups.setdefault(json.dumps(rest, sort_keys=True), []).append(experiment)
    ranked = sorted(groups.values(), key=lambda group: (len(group), experiments.index(group[-1])))
    return ranked[-1], [experiment for group in ranked[:-1] for experiment in group]


def rows(key: str, sweep: list[Experiment], known: list[StageRun]) -> pd.DataFrame:
    """Return one row per value, variant and seed with all measures; of repeated ones the newest counts. Variants with one
    value only are left out, and so are optional columns without a number."""
    points = {}
    for experiment in sweep:
        value = flatten(experiment.recipe)[key]
        price = costs.Prices(experiment.lock, known)
        for variant in experiment.recipe["variants"]:
            for seed in experiment.recipe["seeds"]:
                numbers = {
                    column: experiment.metrics.get(f"{stage}/{variant}-{seed}.json", {}).get(name)
                    for column, (stage, name) in ALL_MEASURES.items()
                }
                if None not in [numbers[column] for column in MEASURES]:
                    point = {"value": value, "variant": variant, "seed": seed, "experiment": experiment.name}
                    points[str(value), variant, seed] = {**point, **numbers, **price.of(variant, seed)}
    table = pd.DataFrame(points.values(), columns=["value", "variant", "seed", *TITLES, *COSTS, "experiment"])
    table = table.drop(columns=[column for column in OPTIONAL if table[column].isna().all()])
    numeric = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in table["value"])
    table = table.assign(value=table["value"] if numeric else table["value"].map(str))
    table = table[table.groupby("variant")["value"].transform("nunique") > 1]
    return table.sort_values(["variant", "value", "seed"])


def markdown(key: str, scale: str, runs: pd.DataFrame, about: str, origin: str) -> str:
    """Return one table per variant, in %: means over seeds, with the range of several. Costs are means."""

    def cells(value, group: pd.DataFrame) -> dict[str, str]:
        shown = {title: spread(group[column]) for column, title in TITLES.items() if column in group}
        return {
            key: f"{value:g}" if isinstance(value, float) else str(value),
            **shown,
            **{title: costs.cell(group[column]) for column, title in COSTS.items()},
            "Experiment": ", ".join(group["experiment"].unique()),
        }

    parts = [f"# {in_markdown(f'{key} at scale {scale}')}", *([about] if about else [])]
    for variant, group in runs.groupby("variant", sort=False):
        rows = [cells(value, some) for value, some in group.groupby("value")]
        parts += [f"## {in_markdown(method_name(variant))}", markdown_table(rows)]
    return "\n\n".join([*parts, costs.CAVEAT, in_markdown(origin), f"![{in_markdown(key)}](figure.png)"]) + "\n"


def spread(values: pd.Series) -> str:
    """Return mean and range; a dash where a seed has no number."""
    mean = decimal(values.mean(skipna=False))
    return mean if len(values) < 2 or mean == DASH else f"{mean} ({decimal(values.min())}{DASH}{decimal(values.max())})"


def draw(key: str, runs: pd.DataFrame) -> Figure:
    """Draw a panel per measure, in it a line per variant through the means over seeds and a dot per seed."""
    lines = -(-len(MEASURES) // 3)
    figure, axes = plt.subplots(lines, 3, figsize=(plots.WIDTH, 2.9 * lines + 0.3), squeeze=False)
    variants = list(runs["variant"].unique())
    for axis in axes.flat[len(MEASURES) :]:
        axis.remove()
    for axis, column in zip(axes.flat, MEASURES, strict=False):
        for variant in variants:
            own, shade = runs[runs["variant"] == variant], plots.colour(variant, variants)
            means = own.groupby("value")[column].agg(lambda values: values.mean(skipna=False))
            axis.plot(means.index, means, color=shade, lw=1.8)
            axis.plot(own["value"], own[column], "o", color=shade, ms=5)
        axis.set_title(f"{TITLES[column]} %", fontsize=10)
        axis.set_xlabel(key, fontsize=9)
        axis.set_xticks(sorted(runs["value"].unique()))
        axis.margins(x=0.1, y=0.15)
    handles = [plt.Line2D([], [], color=plots.colour(variant, variants), lw=1.8) for variant in variants]
    figure.legend(handles, map(method_name, variants), loc="outside lower center", ncols=5, fontsize=9)
    return figure


if __name__ == "__main__":
    main()
