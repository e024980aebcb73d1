"""The table and the figure of a sweep: DVC's experiments on this commit that differ in one key of the recipe.

    dvc exp run --queue -S 'pretrain.mask_ratio=0.5,0.65,0.75,0.9'    # a decoder study: -S model.decoder.depth=1,2,4
    dvc exp run --run-all
    python -m milan.sweep pretrain.mask_ratio

Writes reports/sweeps/<key>.md, .csv and .png, and may be repeated as experiments come in. The commit's own results are
a point too. What differs in another key than variants, seeds and runtime is no part of the sweep, and is named.
"""

import argparse
import json
import subprocess
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import yaml

from milan import plots
from milan.errors import UserError
from milan.files import write_whole
from milan.params import nearest
from milan.plots import Figure, plt
from milan.results import MEASURES, TITLES, method
from milan.stage import fail
from milan.table import markdown_table

FREE = ("variants", "seeds", "runtime")  # what may differ within a sweep besides its key
HERE = "this commit"
TITLES = {**TITLES, "miou": "mIoU"}


class Experiment(NamedTuple):
    """An experiment as git keeps it: the recipe's tree, and the metrics by (stage, variant, seed)."""

    name: str
    recipe: dict
    metrics: dict[tuple[str, str, int], dict]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("key", help="the key that was varied, such as pretrain.mask_ratio")
    parser.add_argument("--out", type=Path, default=Path("reports/sweeps"), help="default: %(default)s")
    args = parser.parse_args()
    try:
        write(args.key, read_experiments(), args.out)
    except UserError as error:
        fail(str(error))


def write(key: str, experiments: list[Experiment], out: Path) -> None:
    """Raises UserError unless at least two values of the key have results."""
    sweep, others = members(key, experiments)
    runs = rows(key, sweep)
    if runs.empty:
        raise UserError(
            f"{key}: results of at least two values are needed; DVC has {len(experiments) - 1} experiment(s) on this commit "
            f"(`dvc exp show`). Run some: dvc exp run --queue -S '{key}=ONE,OTHER' && dvc exp run --run-all"
        )
    write_whole(out / f"{key}.csv", runs.to_csv(index=False, lineterminator="\n").encode())
    write_whole(out / f"{key}.md", markdown(key, sweep[0].recipe["scale"], runs).encode())
    plots.save(draw(key, runs), out / f"{key}.png")
    left = f"; no part of this sweep: {', '.join(e.name for e in others)}" if others else ""
    print(f"{out / key}.md: {runs['value'].nunique()} values, {runs['variant'].nunique()} variant(s){left}", flush=True)


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
    recipe = yaml.safe_load(git("show", f"{revision}:params.yaml"))
    folder = f"reports/metrics/{recipe['scale']}"
    held, metrics = set(git("ls-tree", "-r", "--name-only", revision, folder).splitlines()), {}
    for stage in sorted({stage for stage, _ in MEASURES.values()}):
        for variant in recipe["variants"]:
            for seed in recipe["seeds"]:
                path = f"{folder}/{stage}/{variant}-{seed}.json"
                if path in held:
                    metrics[stage, variant, seed] = json.loads(git("show", f"{revision}:{path}"))
    return Experiment(name, recipe, metrics)


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


def rows(key: str, sweep: list[Experiment]) -> pd.DataFrame:
    """A row a value, variant and seed that has all measures, of repeated ones the newest; no variant with one value only."""
    found = {}
    for experiment in sweep:
        value = flattened(experiment.recipe)[key]
        for variant in experiment.recipe["variants"]:
            for seed in experiment.recipe["seeds"]:
                numbers = {
                    column: experiment.metrics.get((stage, variant, seed), {}).get(name)
                    for column, (stage, name) in MEASURES.items()
                }
                if None not in numbers.values():
                    place = (str(value), variant, seed)
                    found[place] = {"value": value, "variant": variant, "seed": seed, **numbers, "experiment": experiment.name}
    table = pd.DataFrame(found.values(), columns=["value", "variant", "seed", *MEASURES, "experiment"])
    numeric = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in table["value"])
    table = table.assign(value=table["value"] if numeric else table["value"].map(str))
    table = table[table.groupby("variant")["value"].transform("nunique") > 1]
    return table.sort_values(["variant", "value", "seed"])


def markdown(key: str, scale: str, runs: pd.DataFrame) -> str:
    """A table a variant, in %: means over seeds, and the range of several."""

    def cells(value, group: pd.DataFrame) -> dict[str, str]:
        shown = {TITLES[column]: spread(group[column]) for column in MEASURES}
        return {
            key: f"{value:g}" if isinstance(value, float) else str(value),
            **shown,
            "Experiment": ", ".join(group["experiment"].unique()),
        }

    parts = [f"# {key} at scale {scale}"]
    for variant, group in runs.groupby("variant", sort=False):
        parts += [f"## {method(variant)}", markdown_table([cells(value, some) for value, some in group.groupby("value")])]
    return "\n\n".join([*parts, f"![{key}]({key}.png)"]) + "\n"


def spread(values: pd.Series) -> str:
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
            axis.plot(means.index, means, color=shade, lw=1.8, label=method(variant))
            axis.plot(own["value"], own[column], "o", color=shade, ms=5)
        axis.set_title(f"{TITLES[column]} %", fontsize=10)
        axis.set_xlabel(key, fontsize=9)
        axis.set_xticks(sorted(runs["value"].unique()))
        axis.margins(x=0.1, y=0.15)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9)
    return figure


if __name__ == "__main__":
    main()
