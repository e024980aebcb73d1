"""Locks: one holder at a time, freed by its end, also on file systems that know no locks."""

import errno
import fcntl
import os
import tempfile
from pathlib import Path
from unittest import mock

import pytest

from milan.core import locks
from milan.core.errors import UserError
from milan.core.locks import lock
from tests.conftest import forked


@pytest.fixture(params=[None, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK], ids=["flock", "ENOSYS", "EOPNOTSUPP", "ENOLCK"])
def place(request, tmp_path, monkeypatch) -> Path:
    """A folder whose file system has locks, or refuses each with this error; the temporary folder has them."""
    (local := tmp_path / "local").mkdir()
    (place := tmp_path / "shared").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(local))
    real = fcntl.flock

    def flock(descriptor: int, kind: int) -> None:
        if request.param and Path(os.readlink(f"/proc/self/fd/{descriptor}")).is_relative_to(place):
            raise OSError(request.param, os.strerror(request.param))
        real(descriptor, kind)

    monkeypatch.setattr(fcntl, "flock", flock)
    return place


def test_a_file_has_one_holder(place):
    held = lock(place / "a")
    assert lock(place / "a", wait=False) is None and lock(place / "a", shared=True, wait=False) is None
    os.close(other := lock(place / "b", wait=False))
    assert other is not None
    os.close(held)
    readers = [lock(place / "a", shared=True, wait=False) for _ in range(2)]
    assert None not in readers and lock(place / "a", wait=False) is None
    for reader in readers:
        os.close(reader)


def test_a_lock_ends_with_its_process(place):
    assert forked(lambda: lock(place / "a") and os._exit(9)) == 9
    held = lock(place / "a", wait=False)
    assert held is not None
    os.close(held)


def test_one_file_by_two_paths_is_one_lock(place, monkeypatch):
    held = lock(place / "a")
    monkeypatch.chdir(place)
    assert lock(Path("a"), wait=False) is None
    os.close(held)


def test_any_other_error_is_raised(tmp_path, monkeypatch):
    def flock(descriptor: int, kind: int) -> None:
        raise OSError(errno.EIO, "a broken disk")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="a broken disk"):
        lock(tmp_path / "a")


@pytest.mark.parametrize("fault", ["another's", "open", "link", "file"])
def test_the_twins_lie_in_a_folder_that_nobody_else_can_prepare(fault, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(locks, "locked", refuse := mock.Mock(side_effect=OSError(errno.ENOLCK, "no locks")))
    folder = tmp_path / f"milan-locks-{os.getuid()}"
    owner = os.getuid()
    if fault == "another's":
        folder.mkdir(mode=0o700)
        monkeypatch.setattr(os, "getuid", lambda: owner + 1)
        folder = folder.rename(tmp_path / f"milan-locks-{os.getuid()}")
    elif fault == "open":
        folder.mkdir(mode=0o770)
        folder.chmod(0o770)
    elif fault == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        folder.touch()
    with pytest.raises(UserError, match=rf"{folder} must be a folder that belongs to you .*set TMPDIR to a folder of your own"):
        lock(tmp_path / "a")
    assert refuse.call_args_list == [mock.call(tmp_path / "a", fcntl.LOCK_EX)]


def test_the_folder_of_twins_is_this_user_s_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = os.umask(0)
    try:
        folder = locks.folder_of_twins()
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o700 and locks.folder_of_twins() == folder
