"""Progress by tqdm: a live bar on a terminal, a line every 15 seconds in a log."""

import sys
from collections.abc import Iterable, Iterator

from tqdm import tqdm

LOG_SECONDS = 15
LOG_FORMAT = "{desc}: {n_fmt}/{total_fmt}, {rate_fmt}, {remaining} left{postfix}"


class Progress(tqdm):
    """progress = Progress("pretrain milan", total=100); progress.update(1, loss=0.5); progress.close()

    A log gets whole lines, where tqdm alone would write carriage returns, and none for work of less than 15 seconds."""

    monitor_interval = 0  # tqdm's thread would run beside a stage that forks

    def __init__(self, name: str, total: int, start: int = 0, shown: bool = True, items: Iterable | None = None):
        self.live = sys.stderr.isatty()
        log = {"mininterval": LOG_SECONDS, "delay": LOG_SECONDS, "miniters": 1, "bar_format": LOG_FORMAT, "leave": False}
        where = {"dynamic_ncols": True} if self.live else log
        super().__init__(items, name, total, initial=start, disable=not shown, **where)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Draw the bar, or write a line to the log unless the last one said the same."""
        if self.live:
            return super().display(msg, pos)
        if self.n != self.last_print_n:
            print(self, file=sys.stderr, flush=True)
        return False  # nothing for close() to clear

    def update(self, n: int = 1, **values: float) -> None:
        """Advance by n, and show these values from the next display on."""
        if values:
            self.set_postfix(values, refresh=False)
        super().update(n)

    def to(self, n: int) -> None:
        """Advance to n of all."""
        self.update(n - self.n)


def track(items: Iterable, name: str, total: int, start: int = 0) -> Iterator:
    """Yield the items and show how many came, on top of those of an earlier run."""
    yield from Progress(name, total, start, items=items)
