"""Judge whether this run reproduces the committed numbers: number by number, and order by order.

    python -m milan.report.reproduction

`make repro` ends with it, and the page shows it. The reference is the committed seeds study of the same scale and recipe in
reports/evidence/, which no run of the pipeline writes: table.csv has the numbers of each seed, dvc.lock the digests of results.

A number is within the spread if it lies in the prediction interval of one more seed: mean ± t s √(1 + 1/n) over the n committed
seeds. s is the standard deviation over the seeds of the variant, or over those of all variants of the column (pooled) where that is
larger: few seeds may agree by luck. With Student's t, all numbers of a run together lie within in about 95 % of the runs
(Bonferroni). Two variants have a clear order if, by the same t, one more seed is not expected to swap them.
"""

import math
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from scipy.special import stdtrit  # scipy.stats takes a second to load

from milan.core.errors import UserError
from milan.core.files import explain_os_errors
from milan.core.identity import Identity, flatten
from milan.core.program import fail
from milan.core.redaction import redact
from milan.core.repository import git
from milan.params import Params, read_params
from milan.report.claims import CONFIDENCE
from milan.report.provenance import read_lock
from milan.report.results import FREE, TITLES, Results, method_name, name_in_sentence, read_results
from milan.report.text import decimal
from milan.tracking.runs import read_yaml

RECIPE, LOCK, METRICS, EVIDENCE = map(Path, ("params.yaml", "dvc.lock", "reports/metrics", "reports/evidence"))
ROUNDING = 0.05  # points: half the last digit of the tables
NUMBER = ["column", "variant"]  # what the study has several seeds of
OF_A_RUN = "dvc.lock params.yaml reports"  # what git has of a run
CHANGES = f"""
git shows changes: this run's results replace the committed ones, and reports/index.html states times and hardware.
Keep them:        git add {OF_A_RUN} && git commit -m 'My run'
Put them aside:   git stash push -u -m 'My run' -- {OF_A_RUN}
Bring them back:  git stash pop && .venv/bin/dvc checkout
Compare runs:     make compare"""


class Reproduction(NamedTuple):
    """The verdict in one sentence, how it was reached, and a row {title: cell} for each number."""

    sentence: str
    notes: tuple[str, ...] = ()
    rows: tuple[dict[str, str], ...] = ()


def main() -> None:
    try:
        with explain_os_errors():
            params = read_params(RECIPE)
            results = read_results(METRICS / params.data.name, Path(params.report.published), params)
            show(judge(results, RECIPE, LOCK, EVIDENCE))
    except UserError as error:
        fail(str(error))


def show(reproduction: Reproduction) -> None:
    """Print the rows, the notes, the sentence, and what to do about git's changed files."""
    if reproduction.rows:
        print(pd.DataFrame(reproduction.rows).to_string(index=False))
    print("", *reproduction.notes, "", reproduction.sentence, sep="\n")
    if git_shows_changes():
        print(CHANGES)


def git_shows_changes() -> bool:
    """Return whether git sees changes of what a run writes. False outside git."""
    try:
        return bool(git("status", "--porcelain", "--", *OF_A_RUN.split()).stdout)
    except OSError:
        return False


def judge(results: Results, recipe: Path, lock: Path, evidence: Path) -> Reproduction:
    """Compare results with the committed seeds study of their recipe.

    recipe: params.yaml; lock: dvc.lock; evidence: the folder of studies. Raises UserError where a file is damaged or missing."""
    params = results.params
    study = find_study(evidence, params.scale)
    if study is None:
        return Reproduction(f"No verdict: {evidence} has no study over seeds at scale {params.scale} to compare with.")
    given, committed = Identity(values_of(recipe)), Identity(values_of(study / "params.yaml"))
    if given != committed:
        differences = redact(given.differences(committed.values))
        return Reproduction(f"No verdict: the recipe is not that of {study}: {differences}.")
    reference = pd.read_csv(study / "table.csv")
    numbers = compare(results.runs, reference)
    if numbers.empty:
        return Reproduction(f"No verdict: {study} has none of the variants {', '.join(params.variants)}.")
    return Reproduction(
        sentence(numbers, swapped(numbers), list(reference["variant"].unique()), results.data.titles),
        (*rules(study, reference, numbers), *identical(lock, study / "dvc.lock", params)),
        tuple(row(number, results.data.titles) for number in numbers.itertuples()),
    )


def find_study(evidence: Path, scale: str) -> Path | None:
    """Return the folder of the seeds study at a scale; None without one."""
    recipes = sorted(evidence.rglob("seeds/params.yaml"))
    return next((path.parent for path in recipes if read_yaml(path).get("scale") == scale), None)


def values_of(recipe: Path) -> dict[str, str]:
    """Return {dotted key: value} of what decides the numbers of a variant and seed."""
    return {key: repr(value) for key, value in flatten(read_yaml(recipe)).items() if not key.startswith(FREE)}


# The comparison.


def spread_over_seeds(reference: pd.DataFrame) -> pd.DataFrame:
    """Return mean and number of seeds of each column and variant (the index) that the study measured, the standard deviation over
    seeds (the variant's or the column's pooled one, whichever is larger), and the degrees of freedom of the pooled one."""
    groups = melt(reference).groupby(NUMBER, sort=False)["value"]
    spread = groups.agg(mean="mean", seeds="count", own="std", squares=lambda values: ((values - values.mean()) ** 2).sum())
    spread = spread[spread["seeds"] > 0]
    columns = spread.groupby("column")
    freedom = columns["seeds"].transform(lambda seeds: (seeds - 1).sum())
    pooled = (columns["squares"].transform("sum") / freedom) ** 0.5
    return spread.assign(freedom=freedom, deviation=spread["own"].fillna(pooled).clip(lower=pooled))[["mean", "seeds", "freedom", "deviation"]]


def compare(runs: pd.DataFrame, reference: pd.DataFrame) -> pd.DataFrame:
    """Return a row per number that the study has: column, variant, seed, value (NaN where the run lacks it), committed (NaN where
    the study lacks the seed), mean over the study's seeds, error (the standard error of one more seed), t, low, high, within."""
    spread = spread_over_seeds(reference).reset_index()
    committed = melt(reference).rename(columns={"value": "committed"})
    numbers = melt(runs).merge(spread, on=NUMBER).merge(committed, on=[*NUMBER, "seed"], how="left")
    outside = (1 - CONFIDENCE) / max(len(numbers), 1)
    t = stdtrit(numbers["freedom"], 1 - outside / 2)
    error = numbers["deviation"] * (1 + 1 / numbers["seeds"]) ** 0.5
    low, high = numbers["mean"] - t * error - ROUNDING, numbers["mean"] + t * error + ROUNDING
    return numbers.assign(error=error, t=t, low=low, high=high, within=numbers["value"].between(low, high))


def melt(runs: pd.DataFrame) -> pd.DataFrame:
    """Return a row per number: variant, seed, column, value."""
    return runs.melt(["variant", "seed"], [column for column in TITLES if column in runs], "column", "value")


def swapped(numbers: pd.DataFrame) -> dict[str, list[str]]:
    """Return {column: pairs of variants that are not in the study's order, in words} for each column with a clear order."""
    pairs: dict[str, list[str]] = {}
    means = numbers.groupby(NUMBER, sort=False)[["value", "mean", "error", "t"]].mean()  # value: over the run's seeds
    for column in means.index.unique("column"):
        for above, below in permutations(means.loc[column].itertuples(), 2):
            if above.mean - below.mean > above.t * math.hypot(above.error, below.error) + ROUNDING:
                words = f"{name_in_sentence(above.Index)} is not above {name_in_sentence(below.Index)}"
                pairs.setdefault(column, []).extend([words] if above.value <= below.value else [])
    return pairs


def identical(lock: Path, committed_lock: Path, params: Params) -> list[str]:
    """Return a sentence on how many results are the bytes of the study's; none where it kept no digests."""
    if not committed_lock.exists():
        return []
    own, committed = (
        {path: digest for entry in read_lock(file, params).values() for path, digest in entry["outs"].items()}
        for file in (lock, committed_lock)
    )
    others = [path for path, digest in committed.items() if own.get(path) != digest]
    if not others:
        return [f"All {len(committed)} results in {committed_lock} are byte-identical in {lock}."]
    same = f"{len(committed) - len(others)} of {len(committed)} results"
    return [f"{same} in {committed_lock} are byte-identical in {lock}; the first other is {others[0]}."]


# The words.


def sentence(numbers: pd.DataFrame, orders: dict[str, list[str]], variants: list[str], titles: dict[str, str]) -> str:
    """Return the verdict. variants: those of the study."""
    within, same = numbers["within"].sum(), sum(not pairs for pairs in orders.values())
    verdict = "Reproduced" if within == len(numbers) and same == len(orders) else "Not reproduced"
    outside = [f"{titles[number.column]} of {called(number)}" for number in numbers[~numbers["within"]].itertuples()]
    counts = [f"{within} of {len(numbers)} numbers within the spread over seeds{but(outside)}"]
    if orders:
        pairs = [f"{titles[column]}: {' and '.join(words)}" for column, words in orders.items() if words]
        counts.append(f"same order in {same} of {len(orders)} columns with a clear order{but(pairs)}")
    missing = [name_in_sentence(variant) for variant in variants if variant not in set(numbers["variant"])]
    return f"{verdict}: {'; '.join(counts)}." + (f" Not run: {', '.join(missing)}." if missing else "")


def but(exceptions: list[str]) -> str:
    return f" (not {'; '.join(exceptions)})" if exceptions else ""


def called(number: tuple) -> str:
    return f"{name_in_sentence(number.variant)}, seed {number.seed}"


def rules(study: Path, reference: pd.DataFrame, numbers: pd.DataFrame) -> list[str]:
    """Return the sentences that define the spread and the order."""
    seeds, percent = ", ".join(map(str, sorted(reference["seed"].unique()))), f"{100 * CONFIDENCE:.0f} %"
    return [
        f"Compared with the committed seeds {seeds} of {study}, made by the same recipe. Spread over seeds: the interval in which "
        "one more seed is to be expected, from the variant's standard deviation over seeds or the one pooled over the column, "
        f"whichever is larger; so wide that in about {percent} of faithful runs all {len(numbers)} numbers lie inside (Student's t, "
        f"Bonferroni), and widened by {ROUNDING} for rounding.",
        "Clear order: two variants have one if, by the same rule, one more seed is not expected to swap them. Other pairs do not "
        "count.",
    ]


def row(number: tuple, titles: dict[str, str]) -> dict[str, str]:
    """Return the cells of one number, in points."""
    return {
        "Algorithm": method_name(number.variant),
        "Seed": str(number.seed),
        "Measure": titles[number.column],
        "Committed": decimal(number.committed, 2),
        "Yours": decimal(number.value, 2),
        "Difference": decimal(number.value - number.committed, 2, sign=True),
        "Spread over seeds": f"{decimal(number.low, 2)} to {decimal(number.high, 2)}",
        "Within": "yes" if number.within else "no",
    }


if __name__ == "__main__":
    main()
