"""The local file of a dataset's rows: made once, whole or not at all, and mapped by everybody."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
import pytest

from regen_dist.data.format.catalogue import RECORD, Dataset, cache_folder, make_once, open_dataset
from regen_dist.data.format.manifest import Skip, finished_manifest, listed
from regen_dist.data.storage.connection import StoreLimits
from regen_dist.data.storage.store import Store
from regen_dist.errors import DataError


def test_rows_and_samples_agree(dataset_folder: Path, tmp_path: Path) -> None:
    dataset = open_dataset(dataset_folder, tmp_path)
    table = dataset.table().to_pylist()
    assert len(table) == len(dataset) == 11
    for number, entry in enumerate(table):
        row, sample = dataset.row(number), dataset.sample(number)
        for name in ("id", "shard", "offset", "size", "checksum", "frames", "height", "width"):
            assert getattr(row, name) == getattr(sample, name) == entry[name]
        assert row.row == number
        assert row.fps == pytest.approx(entry["fps"])
        assert dataset.records["motion"][number] == pytest.approx(entry["motion"], nan_ok=True)
    assert dataset.ids.tolist() == [entry["id"] for entry in table]


def test_it_is_compiled_once_for_all_copies(dataset_folder: Path, tmp_path: Path) -> None:
    first = open_dataset(dataset_folder, tmp_path)
    shutil.copytree(dataset_folder, tmp_path / "copy")
    for index in (tmp_path / "copy").glob("*.parquet"):
        index.unlink()
    second = open_dataset(tmp_path / "copy", tmp_path)
    assert second.catalogue == first.catalogue
    assert np.array_equal(second.records, first.records)


def test_machines_whose_locks_are_apart_do_not_disturb_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Network disks such as BeeGFS and Lustre may lock for one machine alone; home folders lie on them."""
    monkeypatch.setattr("fcntl.flock", lambda *_: None)

    def write(file: IO[bytes]) -> None:
        file.write(b"whole")

    def write_while_another_does(file: IO[bytes]) -> None:
        write(file)
        make_once(tmp_path / "x.npy", write)

    make_once(tmp_path / "x.npy", write_while_another_does)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == ["x.npy"]
    assert (tmp_path / "x.npy").read_bytes() == b"whole"


def test_one_of_many_makes_it(tmp_path: Path) -> None:
    made: list[int] = []

    def write(file: IO[bytes]) -> None:
        made.append(1)
        file.write(b"whole")

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: make_once(tmp_path / "a" / "x.npy", write), range(8)))
    assert made == [1]
    assert (tmp_path / "a" / "x.npy").read_bytes() == b"whole"


def test_it_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    def fail(file: IO[bytes]) -> None:
        file.write(b"half")
        raise DataError("an index is damaged")

    with pytest.raises(DataError, match="an index is damaged"):
        make_once(tmp_path / "x.npy", fail)
    assert list(tmp_path.glob("x*.[nt][pm]*")) == []


def test_what_killed_processes_left_and_what_is_long_unused_is_removed(tmp_path: Path) -> None:
    """Each dataset that was built again and each change of buckets leaves a file that grows with the dataset."""
    hours = {"x.9.tmp": 2, "y.9.tmp": 2, "old.npy": 100 * 24, "pools-old.npy": 100 * 24, "newer.npy": 80 * 24}
    for name, age in {**hours, "opened.npy": 100 * 24}.items():
        (tmp_path / name).write_bytes(bytes(1000))
        os.utime(tmp_path / name, (0, time.time() - 3600 * age))
    make_once(tmp_path / "opened.npy", lambda file: None)
    make_once(tmp_path / "x.npy", lambda file: None)
    left = sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".lock")
    assert left == ["newer.npy", "opened.npy", "x.npy", "y.9.tmp"], "others may be at work on y"


def test_a_disk_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lustre mounted without flock; any other failure is one."""

    def fail(number: int) -> None:
        def flock(file: object, kind: int) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("fcntl.flock", flock)

    fail(errno.ENOSYS)
    make_once(tmp_path / "x.npy", lambda file: None)
    assert (tmp_path / "x.npy").is_file()
    fail(errno.EIO)
    with pytest.raises(DataError, match="cannot be written"):
        make_once(tmp_path / "y.npy", lambda file: None)


def test_a_damaged_catalogue_is_told(dataset_folder: Path, tmp_path: Path) -> None:
    path = open_dataset(dataset_folder, tmp_path).catalogue
    os.truncate(path, path.stat().st_size - 10)
    with pytest.raises(DataError, match=rf"{path.name}: damaged .*; remove it and run the same again"):
        open_dataset(dataset_folder, tmp_path).row(0)


def test_a_folder_that_cannot_be_written_is_one_clear_error(dataset_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="catalogue cannot be written: Not a directory; make room there"):
        open_dataset(dataset_folder, tmp_path / "file")


def test_it_crosses_to_other_processes_small(dataset_folder: Path, tmp_path: Path) -> None:
    dataset = open_dataset(dataset_folder, tmp_path)
    many = tuple(Skip(source=f"video {number}", reason="too short") for number in range(10_000))
    large = Dataset(dataset.store, dataset.manifest.model_copy(update={"skipped": many}), dataset.catalogue)
    assert len(large.records) == 11
    data = pickle.dumps(large)
    assert len(data) < 10_000
    copy = pickle.loads(data)
    assert (len(copy), copy.row(3), copy.sample(3)) == (11, large.row(3), large.sample(3))
    assert copy.read(copy.row(3)) == dataset.read(dataset.row(3))
    assert len(large.manifest.skipped) == 10_000, "it keeps them itself"


def test_limits_are_those_of_its_store(dataset_folder: Path) -> None:
    assert open_dataset(dataset_folder, None, StoreLimits(1.0, 2.0, 3.0)).store.limits == StoreLimits(1.0, 2.0, 3.0)


def test_where_local_copies_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REGEN_CACHE", str(tmp_path / "chosen"))
    assert cache_folder(tmp_path / "configured") == tmp_path / "configured"
    assert cache_folder() == tmp_path / "chosen"
    monkeypatch.delenv("REGEN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "regen"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder("~/here") == tmp_path / "here"
    assert cache_folder() == tmp_path / ".cache" / "regen"
    monkeypatch.setattr("os.path.expanduser", str)  # as without HOME, for a user id without a name
    with pytest.raises(DataError, match="home folder for local copies is not known; set"):
        cache_folder()


def test_a_row_takes_64_bytes() -> None:
    assert RECORD.itemsize == 64


def test_a_manifest_that_is_removed_meanwhile_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another task of an array removes it: between two requests it could go, and the task ended in an error."""
    monkeypatch.setattr(Store, "size", lambda *_: 7)
    assert finished_manifest(Store(tmp_path)) is None


def test_each_source_that_was_left_out_is_one_line() -> None:
    """File names may hold line ends and the codes that move a terminal's cursor."""
    skipped = [Skip(source=name, segment=2, reason="too short") for name in ("a\nb.mp4", "\x1b[2Jé.mp4", "c\u2028.mp4")]
    names = r"a\nb.mp4", r"\x1b[2Jé.mp4", r"c\u2028.mp4"
    assert listed(skipped) == "\n".join(f"  {name} segment 2: too short" for name in names)
    assert listed(skipped * 4).splitlines()[9:] == [f"  {names[0]} segment 2: too short", "  and 2 more"]
