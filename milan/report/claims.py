"""The paper's claims, judged by rule: the difference of two variants, paired by seed, and its 95 % interval.

Supported: the interval (Student's t over the seeds' differences) lies above 0; not supported: below 0; inconclusive: 0 is
inside, or fewer seeds than LEAST.
"""

from collections.abc import Iterable
from typing import NamedTuple

import pandas as pd
from scipy.special import stdtrit  # and not scipy.stats, which takes a second to load

from milan.report.results import MEASURES, Results, in_words

CLAIMS = {  # (the variant that should be above, the variant that it is built from): the claim
    ("clip_target", "mae"): "CLIP features are a better target than pixels",
    ("prompt_decoder", "clip_target"): "The prompting decoder improves on the CLIP target alone",
    ("milan", "prompt_decoder"): "The semantic aware mask improves on the random mask",
    ("milan", "mae"): "MILAN is above MAE",
    ("milan", "scratch"): "MILAN is above no pretraining",
}
LEAST = 3  # seeds
CONFIDENCE = 0.95
COLUMNS = ("claim", "above", "below", "measure", "difference", "low", "high", "seeds", "verdict")
EVIDENCE = "dvc exp run -S 'seeds=[0,1,2]'"
SCOPE = (
    "A seed is an initialisation, an order of the images, their masks and the draws of the evaluations. The teacher, its "
    "bank and the images are the same for all seeds: nothing here speaks for another teacher or other images. Every "
    "interval is one at 95 % by itself; of twenty such, one misses by chance."
)


class Judgement(NamedTuple):
    difference: float  # mean over seeds, in points
    low: float | None  # of the interval; None with fewer than LEAST seeds
    high: float | None
    seeds: int
    verdict: str


def judge(differences: Iterable[float]) -> Judgement:
    """Of one difference a seed."""
    values = pd.Series(differences, dtype=float)
    n, mean = len(values), values.mean()
    if n < LEAST:
        return Judgement(mean, None, None, n, f"inconclusive: {n} seed{'s' if n != 1 else ''}")
    half = stdtrit(n - 1, (1 + CONFIDENCE) / 2) * values.std(ddof=1) / n**0.5
    verdict = "supported" if mean - half > 0 else "not supported" if mean + half < 0 else "inconclusive"
    return Judgement(mean, mean - half, mean + half, n, verdict)


def judged(r: Results) -> pd.DataFrame:
    """A row a claim and measure, of the claims whose two variants were run."""
    rows = []
    for (above, below), claim in CLAIMS.items():
        if {above, below} <= set(r.ours.index):
            pairs = [r.runs[r.runs["variant"] == variant].set_index("seed") for variant in (above, below)]
            rows += [(claim, above, below, column, *judge(pairs[0][column] - pairs[1][column])) for column in MEASURES]
    return pd.DataFrame(rows, columns=COLUMNS)


def csv(r: Results) -> str:
    return judged(r).round(4).to_csv(index=False, lineterminator="\n")


def heading(r: Results) -> str:
    return f"The paper's claims at scale {r.params.scale}"


def rows(r: Results) -> list[dict[str, str]]:
    """Cells of the table; none where one seed, or no two variants of a claim, leave nothing to judge."""
    if len(r.params.seeds) < 2:
        return []
    return [
        {
            "Claim": row.claim,
            "Variants": f"{in_words(row.above)} – {in_words(row.below)}",
            "Measure": r.data.titles[row.measure],
            "Mean difference": f"{row.difference:+.2f}",
            "95 % interval": "–" if pd.isna(row.low) else f"{row.low:+.2f} to {row.high:+.2f}",
            "Seeds": str(row.seeds),
            "Verdict": row.verdict,
        }
        for row in judged(r).itertuples()
    ]


def notes(r: Results) -> list[str]:
    """What a reader has to know to read the rows; empty where there is no claim to judge."""
    if judged(r).empty:
        return []
    if len(r.params.seeds) < 2:
        return [f"One seed carries no spread, so nothing is judged here. Three seeds are: `{EVIDENCE}`."]
    rule = (
        "Differences in points, paired by seed. Supported: their 95 % interval (Student's t) lies above 0; not supported: "
        f"below 0; inconclusive: 0 is inside, or there are fewer than {LEAST} seeds."
    )
    return [rule, SCOPE]
