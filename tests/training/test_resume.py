"""The saved state of a training: which one is loaded, messages on edits and other recipes, damage, hostile files."""

import os
from pathlib import Path

import pytest
import torch

from milan.core.errors import UserError
from tests.conftest import saved_state


def test_the_last_two_states_are_kept(workplace):
    saved = saved_state()
    assert saved.load() is None
    for step in (5, 10, 1000):
        saved.save(step, {"step": step})
    assert [path.name for path in saved.saves()] == ["state-000001000.pt", "state-000000010.pt"]
    assert saved.load() == {"step": 1000}
    saved.clean()
    assert saved.load() is None and not saved.folder.exists()


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "one byte"])
def test_a_damaged_state_is_named_and_passed_over(workplace, damage, capsys):
    saved = saved_state()
    for step in (5, 10):
        saved.save(step, {"step": step, "w": torch.full((50,), float(step))})
    newest = saved.saves()[0]
    data = newest.read_bytes()
    middle = len(data) // 2
    changed = {
        "cut": data[:-7],
        "flipped": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
        "empty": b"",
        "one byte": data[:1],
    }
    newest.write_bytes(changed[damage])
    assert saved.load()["step"] == 5
    said = capsys.readouterr().err
    assert "state-000000010.pt is damaged" in said and "falling back" in said
    saved.saves()[1].write_bytes(b"")
    assert saved.load() is None


def test_a_state_cannot_run_code(workplace, tmp_path):
    class Malice:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "harm",))

    saved = saved_state()
    saved.save(1, {"step": Malice()})
    with pytest.raises(UserError, match=r"state-000000001\.pt is refused.*Nothing in it was run"):
        saved.load()
    assert not (tmp_path / "harm").exists()


# Which state a training loads.


def test_a_state_is_found_by_name_recipe_and_inputs_and_not_by_code(workplace):
    saved_state("one", recipe="a").save(1, {"step": 1})
    assert saved_state("one", recipe="a").load() == {"step": 1}
    assert saved_state("one", recipe="a", code={"milan/method/model.py": "edited"}).load() == {"step": 1}
    assert saved_state("one", recipe="b").load() is None
    assert saved_state("other", recipe="a").load() is None


def test_edits_are_named_recorded_and_accumulated(workplace, capsys):
    first = saved_state(code={"milan/a.py": "1", "milan/b.py": "1", "milan/c.py": "1"})
    first.save(1, {"step": 1})
    first.note_edits()
    assert first.edited() == [] and capsys.readouterr().out == ""
    saved_state(code={"milan/a.py": "2", "milan/b.py": "1", "milan/c.py": "1"}).note_edits()
    assert "the code has changed since this state was saved (milan/a.py). The training goes on" in capsys.readouterr().out
    again = saved_state(code={"milan/a.py": "2", "milan/c.py": "1", "milan/new.py": "1"})
    again.note_edits()
    assert "(milan/b.py, milan/new.py)" in capsys.readouterr().out  # the first is no longer imported, the second newly
    again.note_edits()
    assert again.edited() == ["milan/a.py", "milan/b.py", "milan/new.py"] and capsys.readouterr().out == ""


def test_a_state_of_another_recipe_is_named_before_it_is_left_and_none_pile_up(workplace, capsys):
    for number, recipe in enumerate("abc", 1):
        left = saved_state("pretrain-milan-0", recipe=recipe)
        left.leave_others()
        left.save(number, {"step": number})
        os.utime(left.folder, (number, number))
    said = capsys.readouterr().out
    assert said.count("starts at step 0 and leaves the state of another recipe") == 2
    assert "saved at step 1 in .scratch/pretrain-milan-0-" in said and "recipe is b, was a" in said and "recipe is c, was b" in said
    saved_state("pretrain-milan-1", recipe="z").save(7, {})  # another seed's
    saved_state("pretrain-milan-0", recipe="d").leave_others()
    assert "saved at step 3" in capsys.readouterr().out
    kept = sorted(int(path.stem[-9:]) for path in Path(".scratch").glob("*/state-*.pt"))
    assert kept == [3, 7]
    saved_state("pretrain-milan-0", recipe="c").leave_others()  # this recipe has a state of its own, so none is left
    assert capsys.readouterr().out == ""
