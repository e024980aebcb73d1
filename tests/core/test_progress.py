"""Progress in a log: whole lines, few of them, none for quick work; on a terminal a bar."""

import io

import pytest

from milan.core.progress import Progress, track


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def seconds(monkeypatch) -> list[float]:
    """A clock that the test moves."""
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def test_a_log_gets_a_line_every_15_seconds_and_the_end(seconds, capsys):
    bar = Progress("pretrain milan", 100, start=40)
    for _ in range(50):
        seconds[0] += 1
        bar.update(1, loss=0.25)
    bar.to(100)
    bar.close()
    assert capsys.readouterr().err.splitlines() == [
        "pretrain milan: 55/100,  1.00it/s, 00:45 left, loss=0.25",
        "pretrain milan: 70/100,  1.00it/s, 00:30 left, loss=0.25",
        "pretrain milan: 85/100,  1.00it/s, 00:15 left, loss=0.25",
        "pretrain milan: 100/100,  1.00it/s, 00:00 left, loss=0.25",
    ]


def test_quick_work_and_other_ranks_say_nothing(seconds, capsys):
    assert list(track(range(3), "listing", 3)) == [0, 1, 2]
    hidden = Progress("x", 10, shown=False)
    seconds[0] += 100
    hidden.update(5, loss=1.0)
    hidden.close()
    assert capsys.readouterr().err == ""


def test_the_items_of_an_earlier_run_count(seconds, capsys):
    for _ in track(range(4), "packing train", 10, start=6):
        seconds[0] += 20
    assert capsys.readouterr().err.splitlines()[-1].startswith("packing train: 10/10")


def test_a_terminal_gets_a_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    bar = Progress("drawing", 4)
    bar.to(4)
    bar.close()
    assert "\rdrawing:   0%|" in terminal.getvalue() and "drawing: 100%|" in terminal.getvalue()
