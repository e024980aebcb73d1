"""Files that are whole or not there at all, and the digests that name what a result was made from."""

import errno
import hashlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from milan.core import files
from milan.core.errors import UserError
from milan.params import TransformerSize
from tests.conftest import ROOT, forked


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def raising(error: OSError):
    def fail(*_, **__):
        raise error

    return fail


def test_a_temporary_workspace_uses_the_scratch_folder_of_the_project(tmp_path):
    """States saved there outlive the workspace, which DVC deletes."""
    for folder, scratch in ((tmp_path, ".scratch"), (tmp_path / ".dvc/tmp/exps/standalone/tmp1", "../../../../../.scratch")):
        folder.mkdir(parents=True, exist_ok=True)
        asked = [sys.executable, "-c", "from milan.core.files import SCRATCH; print(SCRATCH)"]
        said = subprocess.run(asked, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        assert said.stdout == f"{scratch}\n"


def test_write_whole_makes_folders_and_replaces(tmp_path):
    path = tmp_path / "a" / "b.json"
    files.write_whole(path, b"one")
    files.write_whole(path, b"two")
    assert path.read_bytes() == b"two" and names(path.parent) == ["b.json"]


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call):
    path = tmp_path / "weights"
    files.write_whole(path, b"old")
    monkeypatch.setattr(os, call, raising(OSError(errno.EIO, "a broken disk")))
    with pytest.raises(OSError, match="a broken disk"):
        files.write_whole(path, b"new")
    assert path.read_bytes() == b"old" and names(tmp_path) == ["weights"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_full_disk_is_said_and_leaves_the_old_file(tmp_path, monkeypatch, call, number):
    path = tmp_path / "weights"
    files.write_whole(path, b"old")
    monkeypatch.setattr(os, call, raising(OSError(number, "full")))
    with pytest.raises(UserError, match=r"disk that holds .*weights is full .*MB free"):
        files.write_whole(path, b"new")
    assert path.read_bytes() == b"old" and names(tmp_path) == ["weights"]


def test_a_disk_that_is_full_from_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "mkdir", raising(OSError(errno.ENOSPC, "full")))
    with pytest.raises(UserError, match="is full"):
        files.write_whole(tmp_path / "not" / "yet" / "there", b"new")
    assert names(tmp_path) == []


def test_a_real_full_device():
    """Linux's /dev/full refuses every byte."""
    with (
        pytest.raises(UserError, match="is full"),
        files.explain_full_disk(Path("/dev/full")),
        open("/dev/full", "wb", buffering=0) as file,
    ):
        file.write(b"x")


def test_other_accidents_keep_their_name(tmp_path):
    with pytest.raises(PermissionError), files.explain_full_disk(tmp_path):
        raise PermissionError(errno.EACCES, "no")


def test_write_json_is_sorted(tmp_path):
    files.write_json(tmp_path / "m.json", {"b": 1, "a": [2.5]})
    assert (tmp_path / "m.json").read_text() == '{\n "a": [\n  2.5\n ],\n "b": 1\n}\n'


@pytest.mark.parametrize("number, words", [
    (errno.EACCES, "it: Permission denied. Mend"), (errno.EROFS, "Read-only"), (errno.ENOSPC, r"disk is full \(it\)"),
])  # fmt: skip
def test_what_the_file_system_refuses_is_said(number, words):
    with pytest.raises(UserError, match=words), files.explain_os_errors():
        raise OSError(number, os.strerror(number), "it")


def test_a_limit_on_the_size_of_files_is_said(tmp_path):
    """`ulimit -f` and FAT refuse a byte that lies too far."""

    def write() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        for data, explained in ((b"x" * 101, files.explain_full_disk(tmp_path / "w")), (b"y" * 101, files.explain_os_errors())):
            too_large = pytest.raises(UserError, match=r"larger than .* may be here.*`ulimit -f unlimited`")
            with too_large as error, explained, open(tmp_path / "w", "wb", buffering=0) as file:
                while data:
                    data = data[file.write(data) :]
            assert "full" not in str(error.value)

    assert forked(write) == 0


def test_a_fault_of_the_program_passes():
    with pytest.raises(ConnectionResetError), files.explain_os_errors():
        raise ConnectionResetError(errno.ECONNRESET, "reset")


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_folder_is_refused_before_it_is_filled(tmp_path, kind):
    (tmp_path / "real").mkdir()
    (tmp_path / "out").touch() if kind == "file" else (tmp_path / "out").symlink_to("real")
    with pytest.raises(UserError, match="cannot be replaced"), files.whole_folder(tmp_path / "out", "f00d"):
        pytest.fail("it worked before it looked")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "real"]
    with pytest.raises(UserError, match="a folder of its own"), files.whole_folder(Path("."), "f00d"):
        pytest.fail("it worked before it looked")


def test_existing_parent(tmp_path):
    assert files.existing_parent(tmp_path / "x" / "y") == tmp_path


# A folder that is an out.


def interrupted(target: Path, digest: str) -> None:
    with pytest.raises(KeyboardInterrupt), files.whole_folder(target, digest) as folder:
        (folder / "first").write_text(f"of {digest}")
        raise KeyboardInterrupt


def test_a_folder_appears_only_at_the_end(tmp_path):
    target = tmp_path / "out"
    with files.whole_folder(target, "f1") as folder:
        (folder / "x").write_text("1")
        assert not target.exists()
    assert names(tmp_path) == ["out"] and names(target) == ["x"]


def test_what_was_there_is_continued_by_the_same_recipe(tmp_path):
    target = tmp_path / "out"
    interrupted(target, "f1")
    assert not target.exists()
    with files.whole_folder(target, "f1") as folder:
        assert (folder / "first").read_text() == "of f1"
        (folder / "second").touch()
    assert names(target) == ["first", "second"] and names(tmp_path) == ["out"]


def test_another_recipe_starts_afresh_and_drops_what_was_there(tmp_path):
    target = tmp_path / "out"
    interrupted(target, "f1")
    with files.whole_folder(target, "f2") as folder:
        assert names(folder) == []
        (folder / "second").touch()
    assert names(target) == ["second"] and names(tmp_path) == ["out"]


def test_an_older_result_stands_until_the_new_one_is_whole(tmp_path):
    target = tmp_path / "out"
    with files.whole_folder(target, "f1") as folder:
        (folder / "old").touch()
    interrupted(target, "f2")
    assert names(target) == ["old"]
    with files.whole_folder(target, "f2") as folder:
        (folder / "new").touch()
    assert names(target) == ["first", "new"]


def test_a_folder_beside_it_is_left_alone(tmp_path):
    interrupted(tmp_path / "imagenet", "f1")
    interrupted(tmp_path / "ade", "f1")
    assert names(tmp_path) == [".ade.part-f1", ".imagenet.part-f1"]


def test_a_disk_that_fills_up_inside_a_folder(tmp_path):
    with pytest.raises(UserError, match="is full"), files.whole_folder(tmp_path / "out", "f1"):
        raise OSError(errno.ENOSPC, "full")
    assert not (tmp_path / "out").exists()


# Digests.


def test_file_digest(tmp_path):
    data = bytes(range(256)) * 5000  # more than a block
    (tmp_path / "x").write_bytes(data)
    assert files.file_digest(tmp_path / "x") == hashlib.sha256(data).hexdigest()


def test_a_digest_follows_from_its_parts():
    assert files.json_digest("a", [1, 2], {"x": 1, "y": 2}) == files.json_digest("a", [1, 2], {"y": 2, "x": 1})
    known = hashlib.sha256(json.dumps(["a", 1]).encode()).hexdigest()[:16]
    assert files.json_digest("a", 1) == known
    assert (
        len(
            {files.json_digest(*parts) for parts in (("a", 1), ("a", 2), ("b", 1), ("a1",), (TransformerSize(4, 1, 1),), (TransformerSize(4, 2, 1),))}
        )
        == 6
    )


def test_a_folder_in_which_nothing_came_to_be_leaves_nothing(tmp_path):
    """A missing data set is no half-done one."""
    with pytest.raises(UserError), files.whole_folder(tmp_path / "out", "f00d"):
        raise UserError("no data")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError), files.whole_folder(tmp_path / "out", "f00d") as folder:
        (folder / "shard").touch()
        raise UserError("full")
    with files.whole_folder(tmp_path / "out", "f00d") as folder:
        assert (folder / "shard").exists()
