"""The fault script's own arithmetic: who is hit when, what counts as survived. The faults themselves take `make torture`."""

import random
import signal
from types import SimpleNamespace

import pytest
import yaml

from milan.core.progress import Progress
from tests import torture, torture_faults
from tests.conftest import ROOT

SECONDS = {"first": 1.0, "second": 0.1, "third": 30.0}


def test_every_stage_is_hit_before_any_is_hit_twice():
    dealt = torture_faults.blows(SECONDS, 20, signal.SIGKILL, random.Random(0))
    stages = [blow.stage for blow in dealt]
    assert len(dealt) == 20 and stages == sorted(stages, key=list(SECONDS).index) and set(stages) == set(SECONDS)
    assert stages.count("third") > 10
    assert all(0 <= blow.after <= SECONDS[blow.stage] for blow in dealt)
    assert {blow.victim for blow in dealt} == {"all", "the stage", "dvc"}
    assert {blow.stage for blow in torture_faults.blows(SECONDS, 3, signal.SIGINT, random.Random(1))} == set(SECONDS)


def test_the_same_seed_deals_the_same_blows():
    one, two, other = (torture_faults.blows(SECONDS, 9, signal.SIGKILL, random.Random(seed)) for seed in (5, 5, 6))
    assert one == two != other
    assert {blow.victim for blow in torture_faults.blows(SECONDS, 9, signal.SIGTERM, random.Random(5))} == {"all"}


def test_flips_are_read_by_stages_that_depend_on_them():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    for name, reader in torture_faults.FLIPS.items():
        deps = stages[reader.partition("@")[0]]["deps"]
        assert any(f"outs/${{data.name}}/{name}".startswith(dep.split("/${item.")[0]) for dep in deps), name


def test_only_results_are_moved_to_the_small_disk():
    train = "python -m stages.x --records r --out outs/{name}/x-{seed} --metrics m.json --curve c.csv"
    clone = SimpleNamespace(
        folder=ROOT,
        truth={"x@milan-0": {"cmd": train}, "report": {"cmd": "python -m stages.report --metrics m --published p --out reports"}}
    )
    assert torture_faults.places(clone, "x@milan-0") == ["outs/demo/x-0", "m.json", "c.csv"]
    assert torture_faults.places(clone, "report") == ["reports"]


def test_a_file_of_other_bytes_on_the_small_disk_is_wrong(tmp_path):
    clone, place = SimpleNamespace(folder=tmp_path), tmp_path / "full"
    for path, text in {"outs/x/a": "one", "full/x/a": "one", "outs/x/b": "two"}.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    torture_faults.whole(clone, place, {"outs/x": "x"})
    (place / "x/a").write_text("on")
    with pytest.raises(torture.Wrong, match="x/a is not the undisturbed run's"):
        torture_faults.whole(clone, place, {"outs/x": "x"})
    with pytest.raises(torture.Wrong, match="y is missing"):
        torture_faults.whole(clone, place, {"outs/y": "y"}, all_there=True)


def test_an_error_is_one_paragraph():
    assert torture.last_error("step 3\n\nerror: a file\nis damaged.\n\nERROR: failed") == "a file is damaged."
    with pytest.raises(torture.Wrong, match="no error is said"):
        torture.last_error("done")
    with pytest.raises(torture.Wrong, match="a traceback"):
        torture.last_error("Traceback (most recent call last)\n\nerror: x")


def test_what_does_not_survive_is_told(capsys):
    def fail():
        torture.demand(1 > 2, "the lock differs")

    row = torture.play("kill", [("one", lambda: None), ("two", fail), ("three", lambda: 1 / 0)], Progress("x", 3, shown=False))
    assert (row.tried, row.survived) == (3, 1)
    assert row.wrong == ["two: Wrong: the lock differs", "three: ZeroDivisionError: division by zero"]
    assert str(row).splitlines()[0].split() == ["kill", "3", "1"] and "DID NOT SURVIVE" in capsys.readouterr().out
    assert str(torture.Row("full-disk", skipped="needs root")).endswith("skipped: needs root")


def test_locks_that_differ_are_told_by_stage():
    assert torture.differing({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}) == ["b", "c"]
