"""How a stage is started."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.parametrize("folder, script", [(".", "stages/pretrain.py"), ("stages", "pretrain.py")])
def test_a_script_started_as_a_file_says_how_to_start_it(folder, script):
    run = subprocess.run([sys.executable, script, "--help"], cwd=ROOT / folder, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == "Start a stage as a module, from the repository's root: python -m stages.pretrain --help\n"
