"""Progress with an ETA: a live bar on a terminal, a line now and then in a log."""

import sys
import time
from collections.abc import Iterable, Iterator

from tqdm import tqdm


class Progress:
    """progress = Progress("pretrain milan", total=100); progress.update(1, loss=0.5); progress.close()"""

    EVERY_SECONDS = 15.0

    def __init__(self, name: str, total: int, start: int = 0, shown: bool = True):
        self.name, self.total, self.n, self.start = name, total, start, start
        self.shown, self.live = shown, sys.stderr.isatty()
        self.began = self.last = time.monotonic()
        self.printed = start
        self.bar = (
            tqdm(total=total, initial=start, desc=name, file=sys.stderr, dynamic_ncols=True) if shown and self.live else None
        )

    def update(self, n: int = 1, **values: float) -> None:
        self.n += n
        if self.bar:
            self.bar.set_postfix({k: f"{v:.4g}" for k, v in values.items()}, refresh=False)
            self.bar.update(n)
        elif self.shown and time.monotonic() - self.last > self.EVERY_SECONDS:
            self.line(**values)

    def to(self, n: int) -> None:
        self.update(n - self.n)

    def line(self, **values: float) -> None:
        self.last, self.printed = time.monotonic(), self.n
        elapsed = self.last - self.began
        rate = (self.n - self.start) / elapsed if elapsed else 0.0
        left = tqdm.format_interval((self.total - self.n) / rate) if rate else "?"
        words = "".join(f", {k} {v:.4g}" for k, v in values.items())
        print(f"{self.name}: {self.n}/{self.total}, {rate:.3g}/s, {left} left{words}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar:
            self.bar.close()
        elif self.shown and time.monotonic() - self.began > self.EVERY_SECONDS and self.printed != self.n:
            self.line()


def track(items: Iterable, name: str, total: int, start: int = 0) -> Iterator:
    progress = Progress(name, total, start)
    for item in items:
        yield item
        progress.update()
    progress.close()
