"""The direction of imports: the contracts of import-linter in pyproject.toml hold, and can fail."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


def lint(folder: Path) -> tuple[int, str]:
    """Exit status and words of `lint-imports` on the project in a folder."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()", "--no-cache"]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_the_contracts_hold():
    status, said = lint(ROOT)
    assert status == 0 and "4 kept, 0 broken" in said, said


@pytest.mark.parametrize(
    "file, line, named",
    [
        ("milan/method/masking.py", "from milan.report import table", "milan.method is not allowed to import milan.report"),
        ("milan/data/records.py", "from milan.ingest import packing", "milan.data is not allowed to import milan.ingest"),
        ("milan/report/table.py", "from stages import report", "milan is not allowed to import stages"),
        ("stages/pretrain.py", "from stages import segment", "stages.pretrain is not allowed to import stages.segment"),
        ("milan/core/files.py", "import torch", "milan.core is not allowed to import torch"),
    ],
)
def test_an_import_against_the_direction_is_named(tmp_path, file, line, named):
    for name in ("milan", "stages"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    source = tmp_path / file
    source.write_text(f"{source.read_text()}\n{line}\n")
    status, said = lint(tmp_path)
    assert status != 0 and named in said, said
