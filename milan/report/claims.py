"""Judge the paper's claims by a rule: the difference of two variants, paired by seed, and its 95 % interval.

A claim is supported when the interval (Student's t over the seeds' differences) lies above 0, not supported when it lies
below 0, and inconclusive when it contains 0, when there are fewer than MIN_SEEDS seeds, or when one has no number.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import pandas as pd
from scipy.special import stdtrit  # scipy.stats takes a second to load

from milan.params import Params
from milan.report.results import MEASURES, Results, name_in_sentence
from milan.report.text import DASH, decimal

CLAIMS = {  # (variant that should be above, variant to compare with): claim
    ("clip_target", "mae"): "CLIP features are a better target than pixels",
    ("prompt_decoder", "clip_target"): "The prompting decoder improves on the CLIP target alone",
    ("milan", "prompt_decoder"): "The semantic aware mask improves on the random mask",
    ("milan", "mae"): "MILAN is above MAE",
    ("milan", "scratch"): "MILAN is above no pretraining",
}
MIN_SEEDS = 3
CONFIDENCE = 0.95
COLUMNS = ("claim", "above", "below", "measure", "difference", "low", "high", "seeds", "verdict")
SCOPE = (
    "A seed is an initialisation, an order of the images, their masks and the draws of the evaluations. The teacher, its "
    "bank and the images are the same for all seeds: the verdicts do not cover other teachers or images. Each "
    "interval covers the true difference in 95 % of cases; of twenty, one misses by chance."
)


class Judgement(NamedTuple):
    """The verdict on a claim in one measure, with the numbers that it follows from."""

    difference: float  # mean over seeds, in points; NaN where a seed has no number
    low: float | None  # end of the interval; None with fewer than MIN_SEEDS seeds
    high: float | None
    seeds: int  # that have a number
    verdict: str


def judge(differences: Iterable[float]) -> Judgement:
    """Judge the differences of two variants, in points, one for each seed; NaN where one of the two has no number."""
    values = pd.Series(differences, dtype=float).replace([math.inf, -math.inf], math.nan)
    n, mean = values.count(), values.mean(skipna=False)
    if n < len(values):
        return Judgement(mean, None, None, n, f"inconclusive: {n} of {len(values)} seeds have a number")
    if n < MIN_SEEDS:
        return Judgement(mean, None, None, n, f"inconclusive: {n} seed{'s' if n != 1 else ''}")
    half_width = stdtrit(n - 1, (1 + CONFIDENCE) / 2) * values.std(ddof=1) / n**0.5
    verdict = "supported" if mean - half_width > 0 else "not supported" if mean + half_width < 0 else "inconclusive"
    return Judgement(mean, mean - half_width, mean + half_width, n, verdict)


def judge_claims(results: Results) -> pd.DataFrame:
    """Return a row per claim and measure, for the claims whose two variants were run."""
    rows = []
    for (above, below), claim in CLAIMS.items():
        if {above, below} <= set(results.ours.index):
            pairs = [results.runs[results.runs["variant"] == variant].set_index("seed") for variant in (above, below)]
            rows += [(claim, above, below, column, *judge(pairs[0][column] - pairs[1][column])) for column in MEASURES]
    return pd.DataFrame(rows, columns=COLUMNS)


def csv(results: Results) -> str:
    """Return reports/claims.csv."""
    return judge_claims(results).round(4).to_csv(index=False, lineterminator="\n")


def heading(results: Results) -> str:
    return f"The paper's claims at scale {results.params.scale}"


def rows(results: Results) -> list[dict[str, str]]:
    """Return the rows of the table of verdicts; none with a single seed or without a claim's two variants."""
    if len(results.params.seeds) < 2:
        return []
    return [
        {
            "Claim": row.claim,
            "Variants": f"{name_in_sentence(row.above)} – {name_in_sentence(row.below)}",
            "Measure": results.data.titles[row.measure],
            "Mean difference": decimal(row.difference, 2, sign=True),
            "95 % interval": DASH if pd.isna(row.low) else " to ".join(decimal(end, 2, sign=True) for end in (row.low, row.high)),
            "Seeds": str(row.seeds),
            "Verdict": row.verdict,
        }
        for row in judge_claims(results).itertuples()
    ]


def three_seeds_command(params: Params) -> str:
    """Return the command that runs a recipe with three seeds. The user's own paths are left out: the table is for others, too."""
    scale = [] if params.scale == "demo" else [f"-S scale={params.scale}"]  # conf/config.yaml has the demo's
    data = [f"-S data.{name}=..." for name in ("imagenet", "ade20k") if getattr(params.data, name)]
    return " ".join(["dvc exp run", *scale, *data, "-S 'seeds=[0,1,2]'"])


def notes(results: Results) -> list[str]:
    """Return the sentences that explain the rows; none without a claim's two variants."""
    if judge_claims(results).empty:
        return []
    if len(results.params.seeds) < 2:
        return [f"One seed has no spread, so no claim is judged. To run three seeds: `{three_seeds_command(results.params)}`."]
    rule = (
        "Differences in points, paired by seed. Supported: their 95 % interval (Student's t) lies above 0; not supported: "
        f"below 0; inconclusive: 0 is inside, or there are fewer than {MIN_SEEDS} seeds."
    )
    return [rule, SCOPE]
