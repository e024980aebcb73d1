"""The command that a message gives mends what it says: a damaged file, wherever DVC's cache lies and whatever its links are, and
results of removed variants."""

import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import yaml

from milan.core.files import damaged
from milan.core.validation import validate
from milan.params import Params
from milan.stage import Kind, Stage, name_leftovers

MAKE = "from pathlib import Path; Path('out').mkdir(exist_ok=True); Path('out/a file').write_bytes(bytes(5000)); open('runs', 'a').write('1')"


def shell(command: str) -> str:
    """Run a command as a user does, with this environment's programs; return what it printed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(command, shell=True, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def flip(path: Path) -> None:
    """Change a byte, of the cache too where the file is a link, as a disk does: size and times stay."""
    before = path.stat()
    path.chmod(0o644)
    with open(path, "r+b") as file:
        file.seek(2500)
        file.write(b"\xff")
    path.chmod(before.st_mode)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("links", ["hardlink", "symlink", "copy"])
def test_the_command_mends_a_damaged_file(workplace, links):
    (project := workplace / "project").mkdir()
    os.chdir(project)
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": {"make": {"cmd": f'python -c "{MAKE}"', "outs": ["out"]}}}))
    shell(f"git init -q && dvc init -q && dvc cache dir ../elsewhere && dvc config cache.type {links} && dvc repro -q")
    file = Path("out/a file")
    flip(file)
    if links == "copy":  # the byte was damaged before it was copied
        (twin,) = [path for path in Path("../elsewhere").rglob("*") if path.is_file() and path.stat().st_size == 5000]
        flip(twin)
    assert file.read_bytes().count(b"\xff") == 1
    shell(re.search("`(find .*?)`", str(damaged(file, "a byte")))[1])
    shell("dvc repro -q")
    assert file.read_bytes() == bytes(5000) and Path("runs").read_text() == "11"


TRAIN = "mkdir -p outs/demo/train/{0} reports/metrics/demo/train && echo {0} | tee outs/demo/train/{0}/w > reports/metrics/demo/train/{0}.json"
CLEAN = "Data and pipelines are up to date.\n"


def test_the_command_for_removed_variants_makes_another_clone_clean(workplace, tree, capsys):
    (project := workplace / "project").mkdir()
    os.chdir(project)
    folders = ["outs/demo/train", "reports/metrics/demo"]
    train = {
        "matrix": {"variant": "${variants}", "seed": [0]},
        "cmd": TRAIN.format("${item.variant}-${item.seed}"),
        "outs": ["outs/demo/train/${item.variant}-${item.seed}"],
        "metrics": [{"reports/metrics/demo/train/${item.variant}-${item.seed}.json": {"cache": False}}],
    }
    report = {"cmd": "cat outs/demo/train/*/w > all", "deps": folders, "outs": [{"all": {"cache": False}}]}
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": {"train": train, "report": report}}))
    commit = "dvc repro -q && git add -A && git -c user.name=a -c user.email=a@b commit -qm all"
    Path("params.yaml").write_text("variants: [milan, mae]\n")
    shell(f"git init -q && dvc init -q && dvc cache dir ../cache && {commit}")
    Path("params.yaml").write_text("variants: [milan]\n")
    shell(f"{commit} && git clone -q . ../other")
    elsewhere = "cd ../other && git pull -q && dvc checkout -q && dvc status"
    assert "outs/demo/train" in shell(elsewhere)
    tree |= {"variants": ["milan"], "seeds": [0]}
    given = Namespace(metrics=Path("reports/metrics/demo"), outs=Path("outs/demo"))
    name_leftovers(Stage("figures", given, validate(Params, tree, "p"), Kind(reads=("outs", "metrics"))))
    said = capsys.readouterr().err
    assert "reports/metrics/demo/train/mae-0.json, outs/demo/train/mae-0: of variants" in said
    shell(re.search("`(rm .*?)`", said)[1].replace("dvc repro", commit))
    assert shell("dvc status") == CLEAN and shell(elsewhere) == CLEAN
    assert Path("all").read_text() == "milan-0\n" and Path("outs/demo/train/milan-0/w").exists()
