"""MILAN: masked image pretraining on language assisted representation (arXiv 2208.06049)."""

import os
import sys

# A program of this project (`python -m`) that finds a locale other than UTF-8 starts again in Python's UTF-8 mode, its
# children too: else it would read the names of files, and the words of git, as other words than they are.
if sys.argv[0] == "-m" and sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
    os.environ["PYTHONUTF8"] = "1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
