"""The paper's claims: intervals by hand, and verdicts by rule."""

import dataclasses
import io
import math
from pathlib import Path

import pandas as pd
import pytest
from scipy import stats

from milan.params import read_params
from milan.report import claims, table
from milan.report.results import MEASURES, TITLES, EvaluationData, Results, read_published, summarise
from tests.conftest import ROOT

RATIO = {"linear": 1.0, "knn": -1.0, "attentive": 3.0, "finetune": 10.0, "miou": 0.0, "dense": 2.0}  # of each measure to the given number


def results(**values: list[float]) -> Results:
    """Make results from one number for each variant and seed; RATIO gives the measures."""
    seeds = list(range(len(next(iter(values.values())))))
    params = dataclasses.replace(read_params("params.yaml"), variants=list(values), seeds=seeds)
    runs = pd.DataFrame(
        [
            {"variant": variant, "seed": seed, **{column: RATIO.get(column, math.nan) * numbers[seed] for column in TITLES}}
            for variant, numbers in values.items()
            for seed in seeds
        ]
    )
    data = EvaluationData("the built-in world", 20, 2000, 11, 400, "Segmentation", 2.1, 17.3, 8000)
    return Results(params, data, runs, summarise(runs), read_published(Path("reports/published.csv")), {}, {})


@pytest.mark.parametrize(
    "differences, mean, low, high, verdict",
    [
        ([1, 2, 3], 2, -0.4841, 4.4841, "inconclusive"),  # sd 1, t 4.3027 with 2 degrees: half-width 4.3027 / √3 = 2.4841
        ([2, 3, 4], 3, 0.5159, 5.4841, "supported"),
        ([-2, -3, -4], -3, -5.4841, -0.5159, "not supported"),
        ([0, 2, 0, 2], 1, -0.8374, 2.8374, "inconclusive"),  # sd 2/√3, t 3.1824 with 3 degrees: 3.1824 / √3 = 1.8374
        ([0, 0, 0], 0, 0, 0, "inconclusive"),
    ],
)
def test_intervals_and_verdicts_by_hand(differences, mean, low, high, verdict):
    judgement = claims.judge(differences)
    assert judgement[:3] == pytest.approx((mean, low, high), abs=1e-4)
    assert judgement[3:] == (len(differences), verdict)


@pytest.mark.parametrize("differences, verdict", [([5.0], "inconclusive: 1 seed"), ([5.0, 5.0], "inconclusive: 2 seeds")])
def test_fewer_than_three_seeds_are_inconclusive(differences, verdict):
    assert claims.judge(differences) == (5.0, None, None, len(differences), verdict)


@pytest.mark.parametrize("differences, seeds", [([2, 3, math.nan], 2), ([2, 3, 4, math.inf], 3), ([math.nan] * 3, 0), ([math.nan], 0)])
def test_a_seed_without_a_number_leaves_the_claim_inconclusive(differences, seeds):
    """2, 3 and 4 alone would be supported."""
    judgement = claims.judge(differences)
    assert math.isnan(judgement.difference)
    assert judgement[1:] == (None, None, seeds, f"inconclusive: {seeds} of {len(differences)} seeds have a number")


def test_a_nan_seed_is_in_no_mean_and_no_verdict():
    judged = results(mae=[1.0, 1.0, 1.0], milan=[3.0, math.nan, 5.0])
    text = table.markdown(judged)
    assert "| MILAN is above MAE | MILAN – MAE | Linear eval | – | – | 2 | inconclusive: 2 of 3 seeds have a number |" in text
    assert "nan" not in text.lower().replace("nan or infinite", "")
    assert claims.csv(judged).splitlines()[1].endswith(",linear,,,,2,inconclusive: 2 of 3 seeds have a number")


def test_a_seed_that_one_variant_lacks_leaves_the_claim_inconclusive():
    whole = results(mae=[1.0, 1.0, 1.0], milan=[3.0, 4.0, 5.0])
    part = whole._replace(runs=whole.runs[(whole.runs["variant"] != "mae") | (whole.runs["seed"] != 1)])
    assert set(claims.judge_claims(whole)["verdict"]) != {"inconclusive: 2 of 3 seeds have a number"}
    assert set(claims.judge_claims(part)["verdict"]) == {"inconclusive: 2 of 3 seeds have a number"}


def test_differences_are_paired_by_seed_and_each_measure_is_judged():
    """The variants' ranges of 100 points overlap, but seed by seed MILAN is 2, 3 and 4 points above."""
    judged = claims.judge_claims(results(prompt_decoder=[0, 50, 100], milan=[2, 53, 104])).set_index("measure")
    assert list(judged.index) == list(MEASURES) and set(judged["claim"]) == {"The semantic aware mask improves on the random mask"}
    assert judged["verdict"].to_dict() == {
        "linear": "supported",
        "knn": "not supported",
        "attentive": "supported",
        "finetune": "supported",
        "miou": "inconclusive",
        "dense": "supported",
    }
    assert judged.loc["finetune", ["difference", "low", "high"]].tolist() == pytest.approx([30, 5.159, 54.841], abs=1e-3)


def test_every_claim_whose_variants_were_run_has_its_own_pair():
    values = {"scratch": 1.0, "mae": 3.0, "clip_target": 7.0, "prompt_decoder": 15.0, "milan": 31.0}
    judged = claims.judge_claims(results(**{variant: [value] * 3 for variant, value in values.items()}))
    linear = judged[judged["measure"] == "linear"].set_index("claim")["difference"]
    assert linear.tolist() == [4.0, 8.0, 16.0, 28.0, 30.0] and list(linear.index) == list(claims.CLAIMS.values())
    assert claims.judge_claims(results(scratch=[1.0], mae=[2.0])).empty


def test_the_report_shows_rule_table_and_scope():
    section = table.markdown(results(mae=[0, 50, 100], milan=[2, 53, 104])).split("### The paper's claims at scale demo\n\n")[1]
    section = section.split("\n\n## ")[0]
    rule, rows, scope = section.split("\n\n")
    assert "paired by seed" in rule and scope == claims.SCOPE
    assert rows.splitlines()[2:] == [
        "| MILAN is above MAE | MILAN – MAE | Linear eval | +3.00 | +0.52 to +5.48 | 3 | supported |",
        "| MILAN is above MAE | MILAN – MAE | k-NN | -3.00 | -5.48 to -0.52 | 3 | not supported |",
        "| MILAN is above MAE | MILAN – MAE | Attentive probe | +9.00 | +1.55 to +16.45 | 3 | supported |",
        "| MILAN is above MAE | MILAN – MAE | Fine-tuning | +30.00 | +5.16 to +54.84 | 3 | supported |",
        "| MILAN is above MAE | MILAN – MAE | Segmentation mIoU | +0.00 | +0.00 to +0.00 | 3 | inconclusive |",
        "| MILAN is above MAE | MILAN – MAE | Dense probe mIoU | +6.00 | +1.03 to +10.97 | 3 | supported |",
    ]


def test_one_seed_names_the_command_for_three_and_two_seeds_have_no_interval():
    text = table.markdown(results(mae=[10.0], milan=[20.0]))
    assert "One seed has no spread, so no claim is judged. To run three seeds: `dvc exp run -S 'seeds=[0,1,2]'`." in text
    assert "MILAN is above MAE" not in text
    two = table.markdown(results(mae=[10.0, 11.0], milan=[20.0, 20.0]))
    assert "| MILAN is above MAE | MILAN – MAE | Linear eval | +9.50 | – | 2 | inconclusive: 2 seeds |" in two


def test_the_command_for_three_seeds_names_scale_and_data_without_their_paths():
    params = read_params("params.yaml")
    own = dataclasses.replace(params, scale="photos", data=dataclasses.replace(params.data, imagenet="/home/me/photos"))
    assert claims.three_seeds_command(own) == "dvc exp run -S scale=photos -S data.imagenet=... -S 'seeds=[0,1,2]'"


def test_without_a_claim_s_variants_there_is_no_section_and_the_csv_has_only_its_header():
    alone = results(milan=[1.0, 2.0, 3.0])
    assert "claims" not in table.markdown(alone)
    assert claims.csv(alone) == ",".join(claims.COLUMNS) + "\n"


def test_the_csv_has_the_numbers():
    rows = pd.read_csv(io.StringIO(claims.csv(results(mae=[0, 0, 0], milan=[2, 3, 4])))).set_index("measure")
    assert rows.loc["linear", ["above", "below", "difference", "low", "high", "seeds", "verdict"]].tolist() == [
        "milan",
        "mae",
        3.0,
        0.5159,
        5.4841,
        3,
        "supported",
    ]


COMMITTED = sorted((ROOT / "reports/evidence").glob("**/claims.csv"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.parent.relative_to(ROOT / "reports/evidence").as_posix())
def test_the_committed_verdicts_follow_from_the_committed_numbers(path):
    """Compute each interval independently: from the table of runs, with Student's t from scipy.stats."""
    runs = pd.read_csv(path.parent / "table.csv").set_index(["variant", "seed"])
    for row in pd.read_csv(path).itertuples():
        differences = runs.loc[row.above, row.measure] - runs.loc[row.below, row.measure]
        assert len(differences) == row.seeds >= 3 and differences.notna().all()
        half = stats.t.ppf(0.975, row.seeds - 1) * differences.std(ddof=1) / math.sqrt(row.seeds)
        low, high = differences.mean() - half, differences.mean() + half
        assert (row.difference, row.low, row.high) == pytest.approx((differences.mean(), low, high), abs=1e-3)
        assert row.verdict == ("supported" if low > 0 else "not supported" if high < 0 else "inconclusive")
