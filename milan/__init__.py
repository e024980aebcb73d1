"""MILAN: masked image pretraining on language assisted representation (arXiv 2208.06049)."""

import importlib
import os
import sys

PUBLIC = ("load_encoder", "load_pretrained")

# A program of this project (`python -m`) that finds a locale other than UTF-8 starts again in Python's UTF-8 mode, its
# children too: else it would read the names of files, and the words of git, as other words than they are.
if sys.argv[0] == "-m" and sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
    os.environ["PYTHONUTF8"] = "1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def __getattr__(name: str):
    """Import the public functions when they are first asked for: they need torch, and most programs of the project do not."""
    if name in PUBLIC:
        return getattr(importlib.import_module("milan.convert.load"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
