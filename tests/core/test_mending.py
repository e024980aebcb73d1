"""The command that a damaged file's message gives mends it, wherever DVC's cache lies and whatever its links are."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from milan.core.files import damaged

MAKE = "from pathlib import Path; Path('out').mkdir(exist_ok=True); Path('out/a file').write_bytes(bytes(5000)); open('runs', 'a').write('1')"


def shell(command: str) -> None:
    """Run a command as a user does, with this environment's programs."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(command, shell=True, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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
