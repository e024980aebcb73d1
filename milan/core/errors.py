"""UserError and Preempted, the two ways in which a stage ends early on purpose, and helpers for their texts."""

import difflib
from collections.abc import Iterable

PREEMPTED = 75  # exit status EX_TEMPFAIL: stopped by a signal, saved, run again to continue


class UserError(Exception):
    """A mistake or an accident outside the code. A stage prints the text as one paragraph and exits with status 1."""

    def __init__(self, text: str):
        # A loader worker's error arrives as torch's text of a traceback, which ends in our text.
        super().__init__(text.rpartition("milan.core.errors.UserError: ")[2])


class Preempted(SystemExit):
    """A signal (a scheduler's preemption, Ctrl-C in training) asked the stage to end; its progress is saved."""

    def __init__(self):
        super().__init__(PREEMPTED)


def nearest(word: str, words: Iterable[str]) -> str:
    """Return "; did you mean X?" for the most similar of `words`, or "" where none is similar."""
    matches = difflib.get_close_matches(str(word), [str(candidate) for candidate in words], n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def listed(texts: list[str], most: int = 5, separator: str = ", ") -> str:
    """Join the first few texts, and count the others."""
    more = f" and {len(texts) - most:,} more" if len(texts) > most else ""
    return separator.join(texts[:most]) + more
