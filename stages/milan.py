"""Say how to start a stage: `python stages/pretrain.py` finds this file in the place of the package milan."""

import sys
from pathlib import Path

raise SystemExit(f"Start a stage as a module, from the repository's root: python -m stages.{Path(sys.argv[0]).stem} --help")
