"""The verdict on a run: numbers and orders beside the committed study over seeds, and what is not compared."""

import dataclasses
import re
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import yaml

from milan.params import read_params
from milan.report import reproduction
from milan.report.reproduction import judge
from milan.report.results import EvaluationData, Results
from tests.conftest import ROOT, change

EVIDENCE, RECIPE, LOCK = Path("evidence"), Path("params.yaml"), Path("dvc.lock")
STUDY = {"mae": (10.0, 11.0, 12.0), "milan": (16.0, 17.0, 18.0)}
# Standard deviation 1 with 4 degrees of freedom. Spread of 2 numbers: t(0.9875; 4) = 3.4954, times √(4/3), and 0.05.
HALF_WIDTH = 4.0862
RULES = 2  # notes before that on bytes


def frame(values: dict[str, tuple], **others: dict[str, tuple]) -> pd.DataFrame:
    """Return runs with linear evaluation, and other columns by name, of variants over seeds from 0 on."""
    rows = [{"variant": v, "seed": seed, "linear": value} for v, numbers in values.items() for seed, value in enumerate(numbers)]
    columns = {name: [value for v in values for value in column[v]] for name, column in others.items()}
    return pd.DataFrame(rows).assign(**columns)


def a_lock(*variations: str, **other: str) -> str:
    """Return a dvc.lock with a teacher and a pretraining of each variation; other: {name in outs/: digest}."""
    names = {"teacher": "teacher", **{f"pretrain@{name}": name for name in variations}}
    stages = {stage: {"outs": [{"path": f"outs/{name}", "md5": other.get(name, f"{name}!")}]} for stage, name in names.items()}
    return yaml.safe_dump({"schema": "2.0", "stages": stages}, sort_keys=False)


@pytest.fixture
def study(tree, workplace) -> Path:
    """Write the committed study of three seeds, and this run's recipe and lock with seed 0."""
    folder = EVIDENCE / "seeds"
    folder.mkdir(parents=True)
    RECIPE.write_text(yaml.safe_dump(tree))
    others = {"seeds": [0, 1, 2], "runtime": {**tree["runtime"], "save_seconds": 7}}
    (folder / "params.yaml").write_text(yaml.safe_dump({**tree, **others}))
    frame(STUDY).to_csv(folder / "table.csv", index=False)
    (folder / "dvc.lock").write_text(a_lock(*(f"{variant}-{seed}" for variant in STUDY for seed in range(3))))
    LOCK.write_text(a_lock("mae-0", "milan-0"))
    return folder


def verdict(runs: pd.DataFrame) -> reproduction.Reproduction:
    variants, seeds = list(runs["variant"].unique()), [int(seed) for seed in runs["seed"].unique()]
    params = dataclasses.replace(read_params(RECIPE), variants=variants, seeds=seeds)
    data = EvaluationData("the built-in world", 20, 2000, 11, 400, "Segmentation", 2.1, 17.3, 8000)
    return judge(Results(params, data, runs, None, None, {}, {}), RECIPE, LOCK, EVIDENCE)


def test_identical_bytes_and_the_spread_by_hand(study):
    made = verdict(frame({"mae": (10.0,), "milan": (16.0,)}))
    assert made.sentence == (
        "Reproduced: 2 of 2 numbers within the spread over seeds; same order in 1 of 1 columns with a clear order."
    )
    assert made.notes[RULES:] == ("All 3 results in evidence/seeds/dvc.lock are byte-identical in dvc.lock.",)
    assert "seeds 0, 1, 2 of evidence/seeds" in made.notes[0] and "about 95 % of faithful runs all 2 numbers" in made.notes[0]
    assert list(made.rows[1].values()) == ["MILAN", "0", "Linear eval", "16.00", "16.00", "+0.00", "12.91 to 21.09", "yes"]
    assert made.rows[0]["Spread over seeds"] == f"{11 - HALF_WIDTH:.2f} to {11 + HALF_WIDTH:.2f}"


def test_bytes_that_differ_are_counted_and_the_first_is_named(study):
    LOCK.write_text(a_lock("mae-0", "milan-0", **{"mae-0": "other"}))
    made = verdict(frame({"mae": (10.0,), "milan": (16.0,)}))
    assert made.notes[RULES:] == (
        "2 of 3 results in evidence/seeds/dvc.lock are byte-identical in dvc.lock; the first other is outs/mae-0.",
    )
    (study / "dvc.lock").unlink()
    assert len(verdict(frame({"mae": (10.0,), "milan": (16.0,)})).notes) == RULES


@pytest.mark.parametrize("value, within", [(21.08, True), (21.09, False), (12.92, True), (12.91, False)])
def test_a_number_is_within_up_to_the_end_of_the_spread(study, value, within):
    made = verdict(frame({"mae": (10.0,), "milan": (value,)}))
    assert made.sentence.startswith("Reproduced: 2 of 2" if within else "Not reproduced: 1 of 2")
    assert within or "(not Linear eval of MILAN, seed 0)" in made.sentence
    assert made.rows[1]["Within"] == ("yes" if within else "no")
    assert made.rows[1]["Difference"] == f"{value - 16:+.2f}"


def test_a_swapped_order_is_named_though_every_number_is_within(study):
    made = verdict(frame({"mae": (14.5,), "milan": (14.0,)}))
    assert made.sentence == (
        "Not reproduced: 2 of 2 numbers within the spread over seeds; same order in 0 of 1 columns with a clear order "
        "(not Linear eval: MILAN is not above MAE)."
    )


@pytest.mark.parametrize("gap, clear", [(5.75, False), (5.77, True)])
def test_a_pair_that_one_more_seed_may_swap_has_no_order(study, gap, clear):
    """3.4954, times √(4/3 + 4/3), and 0.05: a difference of 5.758 is needed."""
    frame({"mae": STUDY["mae"], "milan": tuple(value + gap for value in STUDY["mae"])}).to_csv(study / "table.csv", index=False)
    made = verdict(frame({"mae": (13.0,), "milan": (12.9,)}))
    assert made.sentence.startswith("Not reproduced" if clear else "Reproduced: 2 of 2 numbers within the spread over seeds.")


def test_seeds_that_agree_by_luck_take_the_pooled_spread_and_others_keep_their_own(study):
    """Deviations 1 and 0, pooled √(1/2): half widths 4.086, and 3.4954 √(1/2) √(4/3) + 0.05 = 2.904."""
    frame({**STUDY, "milan": (17.0, 17.0, 17.0)}).to_csv(study / "table.csv", index=False)
    rows = verdict(frame({"mae": (10.0,), "milan": (19.0,)})).rows
    assert [row["Spread over seeds"] for row in rows] == ["6.91 to 15.09", "14.10 to 19.90"]


def test_a_column_has_its_own_spread_and_all_numbers_share_the_confidence(study):
    """Four numbers: t(0.99375; 4) = 4.3147. k-NN has a standard deviation of 2."""
    doubled = {variant: tuple(2 * value for value in values) for variant, values in STUDY.items()}
    frame(STUDY, knn=doubled).to_csv(study / "table.csv", index=False)
    made = verdict(frame({"mae": (10.0,), "milan": (16.0,)}, knn={"mae": (20.0,), "milan": (60.0,)}))
    spreads = {(row["Algorithm"], row["Measure"]): row["Spread over seeds"] for row in made.rows}
    assert spreads["MILAN", "Linear eval"] == "11.97 to 22.03" and spreads["MILAN", "k-NN"] == "23.99 to 44.01"
    assert "3 of 4 numbers" in made.sentence


def test_a_number_that_the_run_lacks_is_not_reproduced_and_one_that_the_study_lacks_is_not_counted(study):
    scores = {"mae": (None,) * 3, "milan": (20.0, 21.0, 22.0)}
    frame(STUDY, zero_shot=scores).to_csv(study / "table.csv", index=False)
    made = verdict(frame({"mae": (10.0,), "milan": (16.0,)}, zero_shot={"mae": (5.0,), "milan": (float("nan"),)}))
    assert made.sentence.startswith("Not reproduced: 2 of 3 numbers") and "(not Zero-shot of MILAN, seed 0)" in made.sentence
    assert made.rows[-1]["Yours"] == made.rows[-1]["Difference"] == "–"


def test_variants_that_were_not_run_are_named(study):
    made = verdict(frame({"milan": (16.5,)}))
    assert made.sentence == "Reproduced: 1 of 1 numbers within the spread over seeds. Not run: MAE."
    assert verdict(frame({"scratch": (1.0,)})).sentence == "No verdict: evidence/seeds has none of the variants scratch."


def test_another_seed_has_a_spread_but_no_committed_number(study):
    runs = frame({"milan": (16.5,)}).assign(seed=9)
    assert list(verdict(runs).rows[0].values())[1:6] == ["9", "Linear eval", "–", "16.50", "–"]


def test_several_seeds_are_judged_one_by_one_and_ordered_by_their_means(study):
    made = verdict(frame({"mae": (14.5, 11.0), "milan": (14.0, 17.0)}))
    assert made.sentence.startswith("Reproduced: 4 of 4 numbers") and [row["Seed"] for row in made.rows] == ["0", "1"] * 2


def test_a_run_of_another_recipe_has_no_verdict(study, tree):
    change(tree, "pretrain.mask_ratio", 0.5)
    RECIPE.write_text(yaml.safe_dump(tree))
    assert verdict(frame({"milan": (16.0,)})) == (
        "No verdict: the recipe is not that of evidence/seeds: pretrain.mask_ratio is 0.5, was 0.75.",
        (),
        (),
    )


def test_a_scale_without_a_study_has_no_verdict(study, tree):
    change(tree, "scale", "mine")
    RECIPE.write_text(yaml.safe_dump(tree))
    made = verdict(frame({"milan": (16.0,)}))
    assert made.sentence == "No verdict: evidence has no study over seeds at scale mine to compare with."


def test_a_missing_run_is_an_error_that_names_its_file(study, tree, capsys):
    with pytest.raises(SystemExit) as stopped:
        reproduction.main()
    assert stopped.value.code == 1
    assert f"reports/metrics/{tree['scale']}/linear_eval/scratch-0.json is missing" in " ".join(capsys.readouterr().err.split())


def test_git_s_changes_are_explained_and_without_git_nothing_is_said(study, monkeypatch, capsys):
    made = verdict(frame({"mae": (10.0,), "milan": (16.0,)}))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(Path.cwd().parent))

    def said() -> str:
        reproduction.show(made)
        return capsys.readouterr().out

    assert made.sentence in (outside := said()) and "Spread over seeds" in outside and "git" not in outside
    Path("reports").mkdir()
    for name in ("index.html", "table.csv"):
        Path("reports", name).write_text("committed")
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    for words in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-qm", "one"]):
        subprocess.run(["git", *words], check=True)
    assert "git" not in said()
    Path("reports/table.csv").write_text("mine")
    assert "git shows changes" in (inside := said())
    # The commands that it names do what it says; tests/stages/test_pipeline.py runs those of DVC.
    commands = dict(re.split(": +", line) for line in inside.splitlines() if ":  " in line)
    subprocess.run(commands["Put them aside"], shell=True, check=True)
    assert Path("reports/table.csv").read_text() == "committed" and "git" not in said()
    subprocess.run(commands["Bring them back"].removesuffix(" && .venv/bin/dvc checkout"), shell=True, check=True)
    for name in ("GIT_AUTHOR", "GIT_COMMITTER"):
        monkeypatch.setenv(f"{name}_NAME", "t")
        monkeypatch.setenv(f"{name}_EMAIL", "t@example.org")
    subprocess.run(commands["Keep them"], shell=True, check=True)
    assert Path("reports/table.csv").read_text() == "mine" and "git" not in said()
    Path("reports/table.csv").write_text("other")
    monkeypatch.setenv("PATH", "")
    assert "git shows" not in said()


def test_the_repository_has_a_study_of_the_demo_with_seeds_and_digests(monkeypatch):
    monkeypatch.chdir(ROOT)
    folder = reproduction.find_study(reproduction.EVIDENCE, "demo")
    assert folder == Path("reports/evidence/seeds") and (folder / "dvc.lock").exists()
    assert pd.read_csv(folder / "table.csv")["seed"].nunique() >= 3
