"""A lock that a killed build left is deleted; one that a live build holds is not."""

from __future__ import annotations

import os
import time
from pathlib import Path

from launcher.supervise import clear_stale_locks


def _lock(folder: Path, name: str, age_s: float = 3600.0) -> Path:
    lock = folder / name / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (time.time() - age_s,) * 2)
    return lock


def test_a_lock_that_nobody_holds_is_deleted(tmp_path: Path) -> None:
    lock = _lock(tmp_path, "operator")
    assert clear_stale_locks(tmp_path) == [lock]
    assert not lock.exists()


def test_a_lock_that_a_builder_holds_open_is_kept(tmp_path: Path) -> None:
    lock = _lock(tmp_path, "operator")
    with lock.open():
        assert clear_stale_locks(tmp_path) == []
    assert lock.exists()


def test_a_young_lock_is_kept(tmp_path: Path) -> None:
    lock = _lock(tmp_path, "operator", age_s=0.0)
    assert clear_stale_locks(tmp_path) == []
    assert lock.exists()


def test_a_folder_that_is_not_there_has_no_locks(tmp_path: Path) -> None:
    assert clear_stale_locks(tmp_path / "absent") == []
