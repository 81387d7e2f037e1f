"""A disk without locks is told by one error, with the setting that moves what lies on it."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.data.folder import open_folder
from tunesmith.errors import LockError
from tunesmith.evaluate.store import only_writer
from tunesmith.export.folder import new_folder
from tunesmith.locks import Lock, Timeout
from tunesmith.remote.copies import _alone
from tunesmith.runs.lease import Lease

# Each holds a lock below the folder; what its hint names.
HOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "prepared data of a home": (lambda folder: open_folder(folder / "new", {}), "--home"),
    "prepared data elsewhere": (lambda folder: open_folder(folder / "new", {}, "data_dir"), "--data_dir"),
    "a run": (lambda folder: Lease(folder / "lease.json"), "--home"),
    "an export": (lambda folder: new_folder(folder / "out", False, []), "--output_dir"),
    "an evaluation of a run": (lambda folder: only_writer(folder, True), "copy the run"),
    "an evaluation of a folder": (lambda folder: only_writer(folder, False), "--home"),
    "a copy of what was fetched": (lambda folder: _alone(folder / ".lock", "s3://a/b"), "--home"),
}


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
@pytest.mark.parametrize("holder", HOLDERS)
def test_a_disk_without_locks_is_told(
    holder: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_locks(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", without_locks)  # a disk's answer
    hold, named = HOLDERS[holder]

    with pytest.raises(LockError) as raised, hold(tmp_path):
        pass

    error = raised.value
    assert error.exit_code == 2
    assert "has no locks" in error.message and str(tmp_path) in error.message
    assert os.strerror(number) in error.message
    assert error.hint is not None and named in error.hint and "flock" in error.hint
    assert not (tmp_path / "new").exists() and not (tmp_path / "out").exists()


def test_a_lock_is_held_by_one_and_given_back(tmp_path: Path) -> None:
    with Lock(tmp_path / "lock", "").acquire(), pytest.raises(Timeout):
        Lock(tmp_path / "lock", "").acquire(timeout=0)
    Lock(tmp_path / "lock", "").acquire(timeout=0).release()
