"""`pip install` of this repository gives the package milan, whole and alone, with what its public functions import."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile

from milan.core.code import closure
from tests.conftest import ROOT

DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml"}


def test_the_wheel_holds_the_package_and_nothing_else(tmp_path):
    for name in ("milan", "stages", "tests"):
        shutil.copytree(ROOT / name, tmp_path / "tree" / name, ignore=shutil.ignore_patterns("__pycache__", "golden"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "hubconf.py"):
        shutil.copy(ROOT / name, tmp_path / "tree")
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path / "tree", check=True, capture_output=True)
    (wheel,) = tmp_path.glob("milan-*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = (path for path in (ROOT / "milan").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert names == {path.relative_to(ROOT).as_posix() for path in files}


def test_its_dependencies_are_what_the_public_functions_import():
    imported = set()
    for file in closure(ROOT / "milan/convert/load.py", ROOT / "milan/convert/__main__.py", ROOT / "milan/data/transforms.py"):
        for node in ast.parse(file.read_text()).body:  # not inside functions: reading a recipe of conf/ needs a clone
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
    needed = imported - set(sys.stdlib_module_names) - {"milan"}
    named = set(re.findall(r'"(\w+)"', re.search(r"(?m)^dependencies = (.*)$", (ROOT / "pyproject.toml").read_text())[1]))
    assert {DISTRIBUTIONS.get(name, name) for name in needed} == named
    pinned = set(re.findall(r"(?m)^([\w-]+)==", (ROOT / "requirements.txt").read_text().lower()))
    assert named <= pinned
