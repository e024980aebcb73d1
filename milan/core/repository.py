"""What git knows of the project: its revision, and whether experiments can be kept."""

import subprocess
import sys
from pathlib import Path

from milan.core.errors import UserError
from milan.core.files import project_root


def git(*words: str) -> subprocess.CompletedProcess:
    """Run git in the working folder. Raises OSError where git is not installed."""
    return subprocess.run(["git", *words], capture_output=True, text=True)


def revision() -> str:
    """Return the revision of the working tree, with "+changes" when it has any; "none" outside git, and where git does not
    read the repository because another user owns it, which is printed."""
    try:
        asked = git("rev-parse", "HEAD")
    except OSError:
        return "none"
    if "safe.directory" in asked.stderr:
        print(
            "git does not read this repository, since another user owns it: this run is recorded without its revision. "
            f"`git config --global --add safe.directory {git_root()}` mends that.",
            file=sys.stderr,
        )
    if asked.returncode:
        return "none"
    changed = git("status", "--porcelain", "-uno", "milan", "stages", "conf").stdout
    return asked.stdout.strip() + ("+changes" if changed.strip() else "")


def git_root() -> Path:
    """Return the closest folder with a .git, from the working folder upwards."""
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / ".git").exists()), here)


def refuse_lost_experiments() -> None:
    """Raise UserError in a shallow clone, where DVC runs experiments and then keeps none of their results."""
    if git("-C", str(project_root()), "rev-parse", "--is-shallow-repository").stdout.strip() == "true":
        raise UserError(
            "This clone is shallow (git clone --depth), and DVC would lose the results of its experiments. Run "
            "`git fetch --unshallow` first."
        )
