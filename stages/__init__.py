"""The stages of the pipeline, one script each."""

import gc
import sys

import milan  # noqa: F401  # first of all, for its UTF-8 mode

if sys.argv[0] == "-m":  # as it is while Python looks for the script of `python -m stages.<name>`
    gc.disable()  # until milan.core.program.loaded: while libraries load, collections find nothing and take a quarter of the time
