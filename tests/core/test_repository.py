"""The project beside git: its revision, another owner, a sub-folder, a shallow clone, an archive without git."""

import os
import stat
import subprocess
from pathlib import Path

import pytest

from milan.core.errors import UserError
from milan.core.repository import refuse_lost_experiments, revision
from tests.conftest import ROOT

USER = ["-c", "user.name=a", "-c", "user.email=a@b"]


def git(*words: str) -> str:
    return subprocess.run(["git", *USER, *words], check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(params=["whole", "sub-folder"])
def project(request, workplace, monkeypatch) -> Path:
    """A project as a repository of its own, and as a folder of a larger one; the working folder is the project's."""
    git("init", "-q")
    folder = workplace if request.param == "whole" else workplace / "papers" / "milan"
    (folder / "milan").mkdir(parents=True)
    (folder / "milan" / "a.py").write_text("1\n")
    git("add", "-A")
    git("commit", "-qm", "one")
    monkeypatch.chdir(folder)
    return folder


def test_a_revision_tells_of_changes_to_the_code(project):
    assert revision() == git("rev-parse", "HEAD")
    Path("note").touch()
    assert revision() == git("rev-parse", "HEAD")
    Path("milan/a.py").write_text("2\n")
    assert revision() == git("rev-parse", "HEAD") + "+changes"


def test_a_checkout_of_another_owner_is_said(project, monkeypatch, capsys):
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    assert revision() == "none"
    root = subprocess.run(["git", "rev-parse", "--show-toplevel"], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    assert f"`git config --global --add safe.directory {root.stdout.strip()}`" in capsys.readouterr().err


def test_a_folder_without_git_has_no_revision(workplace, monkeypatch, capsys):
    assert revision() == "none"
    monkeypatch.setenv("PATH", "")
    assert revision() == "none" and capsys.readouterr().err == ""


def test_experiments_of_a_shallow_clone_are_refused(project, monkeypatch):
    refuse_lost_experiments()
    root = git("rev-parse", "--show-toplevel")
    Path(root, "more").touch()
    git("-C", root, "add", "-A")
    git("-C", root, "commit", "-qm", "two")
    git("clone", "-q", "--depth", "1", f"file://{root}", f"{root}/clone")
    monkeypatch.chdir(f"{root}/clone")
    with pytest.raises(UserError, match="shallow.*`git fetch --unshallow`"):
        refuse_lost_experiments()
    (workspace := Path(root, "clone/.dvc/tmp/exps/standalone/tmp1")).mkdir(parents=True)  # a repository of its own
    monkeypatch.chdir(workspace)
    git("init", "-q")
    with pytest.raises(UserError, match="shallow"):
        refuse_lost_experiments()


STUB = """#!/bin/sh
case "$1 $2" in "-m venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python; cp "$0" .venv/bin/dvc;; esac
echo "$(basename "$0") $*" >> calls
"""


@pytest.mark.parametrize("repository", [True, False])
def test_an_archive_without_git_is_told_before_the_install_and_runs(workplace, repository):
    for name in ("Makefile", "requirements.txt"):
        Path(name).write_bytes((ROOT / name).read_bytes())
    Path("stub").write_text(STUB)
    Path("stub").chmod(stat.S_IRWXU)
    if repository:
        git("init", "-q")
    said = subprocess.run(["make", "setup", f"PYTHON={workplace}/stub"], capture_output=True, text=True, check=True).stdout
    assert ("note: git knows no repository here" in said) is not repository
    assert repository or said.index("note: git knows no") < said.index("Setting up .venv")
    calls = Path("calls").read_text().splitlines()
    assert ("dvc config --local core.no_scm true" in calls) is not repository
    assert sum("pip install" in call for call in calls) == 2


def test_git_leaves_every_byte_as_it_is(workplace):
    """Line ends of a checkout under core.autocrlf would change the digests of dvc.lock."""
    git("clone", "-q", "--no-local", "--depth", "1", "-c", "core.autocrlf=true", f"file://{ROOT}", "clone")
    (workplace / "clone/.gitattributes").write_bytes((ROOT / ".gitattributes").read_bytes())
    subprocess.run("rm params.yaml && git checkout -q params.yaml", shell=True, cwd="clone", check=True)
    assert Path("clone/params.yaml").read_bytes() == git("-C", str(ROOT), "show", "HEAD:params.yaml").encode() + b"\n"
