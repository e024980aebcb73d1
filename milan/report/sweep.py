"""The table and the figure of a sweep: DVC's experiments on this commit that differ in one key of the recipe.

    dvc exp run --queue -S 'pretrain.mask_ratio=0.5,0.65,0.75,0.9'    # a decoder study: -S model.decoder.depth=1,2,4
    dvc exp run --run-all
    python -m milan.report.sweep pretrain.mask_ratio

Writes table.md, table.csv and figure.png to reports/sweeps/<key>/, and for every experiment its params.yaml and dvc.lock;
may be repeated as experiments come in. The commit's own results are a point too. What differs in another key than
variants, seeds and runtime is no part of the sweep, and is named. What the target bank and pretraining cost stands beside
what they came to, as far as MLflow and dvc.lock know it.
"""

import argparse
import json
import subprocess
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import yaml

from milan.core.errors import UserError
from milan.core.files import write_whole
from milan.core.program import fail
from milan.core.typed import nearest
from milan.report import costs, plots
from milan.report.costs import COSTS
from milan.report.plots import Figure, plt
from milan.report.provenance import StageRun
from milan.report.results import MEASURES, TITLES, ZERO_SHOT, method_name
from milan.report.table import DASH, markdown_table
from milan.tracking.runs import parse_yaml, recipe_stages

DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
FREE = ("variants", "seeds", "runtime")  # what may differ within a sweep besides its key
HERE = "this commit"
AFTER = ("report", "figures", "page")  # the evaluations: an experiment may have left these as its commit had them
TITLES = {**TITLES, "miou": "mIoU"}


class Experiment(NamedTuple):
    """An experiment as git keeps it: the recipe's tree, the metrics by (stage, variant, seed), and dvc.lock's stages."""

    name: str
    recipe: dict
    metrics: dict[tuple[str, str, int], dict]
    lock: dict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("key", help="the key that was varied, such as pretrain.mask_ratio")
    parser.add_argument("--out", type=Path, default=Path("reports/sweeps"), help="default: %(default)s")
    args = parser.parse_args()
    try:
        experiments = read_experiments()
        write(args.key, experiments, costs.known_runs(experiments[0].recipe["scale"]), args.out / args.key)
    except UserError as error:
        fail(str(error))


def write(key: str, experiments: list[Experiment], known: list[StageRun], out: Path, about: str = "") -> None:
    """known: of MLflow; about: a paragraph above the tables. Raises UserError unless two values of the key have results."""
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
            keep(out / experiment.name, experiment.recipe, experiment.lock)
    left = f"; no part of this sweep: {', '.join(e.name for e in others)}" if others else ""
    print(f"{out / 'table.md'}: {runs['value'].nunique()} values, {runs['variant'].nunique()} variant(s){left}", flush=True)


def keep(folder: Path, recipe: dict, lock: dict) -> None:
    """What an experiment can be had again from: `dvc checkout` with these two in place, or `dvc repro`."""
    for name, tree in {"params.yaml": recipe, "dvc.lock": {"schema": "2.0", "stages": lock}}.items():
        write_whole(folder / name, yaml.dump(tree, Dumper=DUMPER, sort_keys=False).encode())


# ------------------------------------------------------------------------------------------------------- from git and DVC


def read_experiments() -> list[Experiment]:
    """This commit's results and those of DVC's experiments on it, the oldest first."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        found = [pair for pairs in Repo().experiments.ls().values() for pair in pairs]
    except DvcException as error:
        raise UserError(f"DVC cannot list its experiments: {error}") from None
    found.sort(key=lambda pair: int(git("show", "-s", "--format=%ct", pair[1])))
    return [read_experiment(HERE, "HEAD"), *(read_experiment(name, revision) for name, revision in found)]


def read_experiment(name: str, revision: str) -> Experiment:
    """Without dvc.lock, before a first run, the lock is empty."""
    recipe = yaml.safe_load(git("show", f"{revision}:params.yaml"))
    folder = f"reports/metrics/{recipe['scale']}"
    held, metrics = set(git("ls-tree", "-r", "--name-only", revision, folder).splitlines()), {}
    for stage in sorted({stage for stage, _ in MEASURES.values()}):
        for variant in recipe["variants"]:
            for seed in recipe["seeds"]:
                path = f"{folder}/{stage}/{variant}-{seed}.json"
                if path in held:
                    metrics[stage, variant, seed] = json.loads(git("show", f"{revision}:{path}"))
    lock = git("show", f"{revision}:dvc.lock") if git("ls-tree", "--name-only", revision, "dvc.lock") else ""
    return Experiment(name, recipe, metrics, read_lock(lock, recipe))


def read_lock(text: str, recipe: dict) -> dict:
    """Its stages that made the recipe's numbers."""
    stages = recipe_stages(parse_yaml(text).get("stages", {}), recipe["variants"], recipe["seeds"])
    return {name: entry for name, entry in stages.items() if name not in AFTER}


def git(*words: str) -> str:
    done = subprocess.run(["git", *words], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"git {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


# -------------------------------------------------------------------------------------------------------------- the sweep


def members(key: str, experiments: list[Experiment]) -> tuple[list[Experiment], list[Experiment]]:
    """(those that differ in the key alone, the others): of all such groups the largest, and of equal ones the newest."""
    groups: dict[str, list[Experiment]] = {}
    for experiment in experiments:
        flat = flattened(experiment.recipe)
        if key not in flat:
            raise UserError(f"{key}: the recipe has no such key{nearest(key, flat)}")
        rest = {name: value for name, value in flat.items() if name != key and name.split(".")[0] not in FREE}
        groups.setdefault(json.dumps(rest, sort_keys=True), []).append(experiment)
    ranked = sorted(groups.values(), key=lambda group: (len(group), experiments.index(group[-1])))
    return ranked[-1], [experiment for group in ranked[:-1] for experiment in group]


def flattened(tree: dict, prefix: str = "") -> dict:
    """{"section.key": value}."""
    found = {}
    for name, value in tree.items():
        found |= flattened(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def rows(key: str, sweep: list[Experiment], known: list[StageRun]) -> pd.DataFrame:
    """A row a value, variant and seed that has all measures, of repeated ones the newest; no variant with one value only, and
    no zero-shot column where nobody has a number."""
    found = {}
    for experiment in sweep:
        value = flattened(experiment.recipe)[key]
        price = costs.Prices(experiment.lock, known)
        for variant in experiment.recipe["variants"]:
            for seed in experiment.recipe["seeds"]:
                numbers = {
                    column: experiment.metrics.get((stage, variant, seed), {}).get(name)
                    for column, (stage, name) in {**MEASURES, **ZERO_SHOT}.items()
                }
                if None not in [numbers[column] for column in MEASURES]:
                    place = (str(value), variant, seed)
                    point = {"value": value, "variant": variant, "seed": seed, "experiment": experiment.name}
                    found[place] = {**point, **numbers, **price.of(variant, seed)}
    table = pd.DataFrame(found.values(), columns=["value", "variant", "seed", *TITLES, *COSTS, "experiment"])
    table = table.drop(columns=[column for column in ZERO_SHOT if table[column].isna().all()])
    numeric = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in table["value"])
    table = table.assign(value=table["value"] if numeric else table["value"].map(str))
    table = table[table.groupby("variant")["value"].transform("nunique") > 1]
    return table.sort_values(["variant", "value", "seed"])


def markdown(key: str, scale: str, runs: pd.DataFrame, about: str, origin: str) -> str:
    """A table a variant, in %: means over seeds, and the range of several. Costs are means."""

    def cells(value, group: pd.DataFrame) -> dict[str, str]:
        shown = {title: spread(group[column]) for column, title in TITLES.items() if column in group}
        return {
            key: f"{value:g}" if isinstance(value, float) else str(value),
            **shown,
            **{title: costs.cell(group[column]) for column, title in COSTS.items()},
            "Experiment": ", ".join(group["experiment"].unique()),
        }

    parts = [f"# {key} at scale {scale}", *([about] if about else [])]
    for variant, group in runs.groupby("variant", sort=False):
        parts += [f"## {method_name(variant)}", markdown_table([cells(value, some) for value, some in group.groupby("value")])]
    return "\n\n".join([*parts, costs.CAVEAT, origin, f"![{key}](figure.png)"]) + "\n"


def spread(values: pd.Series) -> str:
    values = values.dropna()
    if values.empty:
        return DASH
    mean = f"{values.mean():.1f}"
    return mean if len(values) < 2 else f"{mean} ({values.min():.1f}–{values.max():.1f})"


def draw(key: str, runs: pd.DataFrame) -> Figure:
    """A panel a measure, a line a variant through the means over seeds; a dot a seed."""
    figure, axes = plt.subplots(1, len(MEASURES), figsize=(plots.WIDTH, 3.2))
    variants = list(runs["variant"].unique())
    for axis, column in zip(axes, MEASURES, strict=True):
        for variant in variants:
            own, shade = runs[runs["variant"] == variant], plots.colour(variant, variants)
            means = own.groupby("value")[column].mean()
            axis.plot(means.index, means, color=shade, lw=1.8, label=method_name(variant))
            axis.plot(own["value"], own[column], "o", color=shade, ms=5)
        axis.set_title(f"{TITLES[column]} %", fontsize=10)
        axis.set_xlabel(key, fontsize=9)
        axis.set_xticks(sorted(runs["value"].unique()))
        axis.margins(x=0.1, y=0.15)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9)
    return figure


if __name__ == "__main__":
    main()
