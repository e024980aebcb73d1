"""The two ways in which a stage ends early on purpose: a mistake that a user can mend, and a signal."""

PREEMPTED = 75  # exit status EX_TEMPFAIL: stopped by a signal, saved, run again to continue


class UserError(Exception):
    """A mistake or an accident outside the code; stages print its text as one paragraph and exit 1."""

    def __init__(self, text: str):
        # From a loader's worker it comes as torch's text of a traceback, which ends in ours.
        super().__init__(text.rpartition("milan.core.errors.UserError: ")[2])


class Preempted(SystemExit):
    """A signal asked for an end (a scheduler's preemption, a Ctrl-C in training), and what can be kept is saved."""

    def __init__(self):
        super().__init__(PREEMPTED)
