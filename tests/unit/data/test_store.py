from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path

import pytest

from regen_dist.data.store import Store, remove_leftovers
from regen_dist.errors import DataError


@pytest.mark.parametrize("spelling", ["{}", "file://{}", "{}/"])
def test_bytes_come_back_whole_and_by_range(tmp_path: Path, spelling: str) -> None:
    store = Store(spelling.format(tmp_path / "a folder"))
    store.put("one.bin", bytes(range(100)))
    assert store.get("one.bin") == bytes(range(100))
    assert store.get_range("one.bin", 10, 5) == bytes(range(10, 15))
    assert store.get_range("one.bin", 10, 0) == b""
    assert store.list() == {"one.bin": 100}
    assert Store(tmp_path / "absent").list() == {}


def test_a_range_past_the_end_and_a_missing_object_are_errors(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put("one.bin", b"12345")
    with pytest.raises(DataError, match=r"one\.bin"):
        store.get_range("one.bin", 3, 10)
    with pytest.raises(DataError, match=r"one\.bin"):
        store.get_range("one.bin", 30, 10)
    with pytest.raises(DataError, match=r"two\.bin: not found"):
        store.get("two.bin")


def test_a_write_that_fails_leaves_the_old_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    store.put("one.bin", b"old")

    def broken_disk(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "replace", broken_disk)
    with pytest.raises(DataError, match="Input/output error"):
        store.put("one.bin", b"new")
    assert store.get("one.bin") == b"old"
    assert os.listdir(tmp_path) == ["one.bin"]


def test_leftovers_of_a_killed_write_are_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (".shard-000000.tar.4711.tmp", ".notes.tmp", "shard-000000.tar"):
        (tmp_path / name).write_bytes(b"")
    assert remove_leftovers(tmp_path) == [".shard-000000.tar.4711.tmp"]
    assert sorted(os.listdir(tmp_path)) == [".notes.tmp", "shard-000000.tar"]


@pytest.mark.parametrize(
    "url", ["pipe:cat /etc/passwd", "pipe://cat", "http://host/x", "ftp://host/x", "file:relative"]
)
def test_other_schemes_are_refused(url: str) -> None:
    with pytest.raises(DataError, match="not supported"):
        Store(url)


def test_credentials_in_a_url_are_refused_and_not_repeated() -> None:
    with pytest.raises(DataError, match="must not carry credentials") as caught:
        Store("s3://name:hunter2@bucket/prefix")
    assert "hunter2" not in str(caught.value)
    with pytest.raises(DataError, match="no bucket"):
        Store("s3:///prefix")


def test_buckets_resolve_and_stores_cross_processes(tmp_path: Path) -> None:
    assert Store("s3://bucket/prefix/").url == "s3://bucket/prefix"
    store = Store(tmp_path)
    store.put("one.bin", b"1")
    assert pickle.loads(pickle.dumps(store)).get("one.bin") == b"1"
