"""Which samples go to which bucket, and the file that says so."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from regen_dist.data.format.catalogue import RECORD, Dataset, open_dataset
from regen_dist.data.loading import datasets as module
from regen_dist.data.loading.datasets import PoolRows, best_size, make_pools
from regen_dist.data.order.mixture import Bucket
from regen_dist.errors import DataError

SIZES = [(32, 32), (32, 64), (64, 32), (64, 64)]


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (100, 100, (64, 64)),  # the largest of its aspect that it fills
        (64, 64, (64, 64)),
        (63, 64, (32, 32)),  # the larger one would enlarge it
        (20, 20, (32, 32)),  # where all would, the smallest
        (720, 1280, (32, 64)),
        (1280, 720, (64, 32)),
        (24, 48, (32, 64)),  # its aspect, though it is enlarged
        (100, 139, (64, 64)),  # nearer to 1:1 than to 1:2
        (100, 150, (32, 64)),
    ],
)
def test_the_best_size(height: int, width: int, expected: tuple[int, int]) -> None:
    best = best_size(np.array([height], np.int32), np.array([width], np.int32), SIZES)
    assert SIZES[int(best[0])] == expected
    others = SIZES[::-1]
    assert others[int(best_size(np.array([height], np.int32), np.array([width], np.int32), others)[0])] == expected


def rows_of(dataset: Dataset, buckets: Sequence[Bucket], folder: Path) -> list[list[int]]:
    pools = make_pools(dataset, buckets, folder)
    rows = PoolRows(pools)
    return [[rows.row(bucket, n) for n in range(pools.size(bucket))] for bucket in range(len(buckets))]


def test_every_sample_goes_where_it_fits(dataset_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = open_dataset(dataset_folder)
    records = dataset.records
    buckets = [Bucket(32, 48, 30), Bucket(48, 32, 30), Bucket(48, 48, 30), Bucket(48, 48, 1)]
    wide, tall = records["width"] > records["height"], records["width"] < records["height"]
    long = records["frames"] >= 30
    assert 0 < long.sum() < len(dataset)
    expected = [wide & long, tall & long, ~wide & ~tall & long, ~wide & ~tall]
    found = rows_of(dataset, buckets, tmp_path)
    assert found == [np.flatnonzero(members).tolist() for members in expected]
    assert all(found[:3])
    monkeypatch.setattr(module, "_CHUNK", 3)
    assert rows_of(dataset, buckets, tmp_path / "in pieces") == found


def test_one_bucket_of_everything_needs_no_table(dataset_folder: Path, tmp_path: Path) -> None:
    dataset = open_dataset(dataset_folder)
    everything = list(range(len(dataset)))
    assert rows_of(dataset, [Bucket(32, 32, 20)], tmp_path) == [everything]
    assert [path.stat().st_size < 200 for path in tmp_path.glob("*.npy")] == [True]
    assert rows_of(dataset, [Bucket(32, 32, 20), Bucket(32, 32, 1)], tmp_path) == [everything, everything]


def test_a_bucket_may_be_empty(dataset_folder: Path, tmp_path: Path) -> None:
    assert rows_of(open_dataset(dataset_folder), [Bucket(32, 32, 1000), Bucket(32, 64, 1000)], tmp_path) == [[], []]


def test_the_file_is_made_once(dataset_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, buckets = open_dataset(dataset_folder), [Bucket(32, 48, 9), Bucket(48, 32, 9)]
    first = make_pools(dataset, buckets, tmp_path)

    def fail(*_: object) -> None:
        raise AssertionError("it looks at every row again")

    monkeypatch.setattr(module, "best_size", fail)
    assert make_pools(dataset, buckets, tmp_path) == first
    with pytest.raises(AssertionError, match="every row"):
        make_pools(dataset, buckets[::-1], tmp_path)


def test_a_damaged_file_is_told(dataset_folder: Path, tmp_path: Path) -> None:
    dataset, buckets = open_dataset(dataset_folder), [Bucket(32, 48, 9), Bucket(48, 32, 9)]
    path = make_pools(dataset, buckets, tmp_path).path
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"pools-\w+\.npy: damaged .*; remove it and run the same again"):
        make_pools(dataset, buckets, tmp_path)


def test_a_file_that_cannot_be_written_is_one_clear_error(dataset_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="catalogue cannot be written: Not a directory; make room there, or set"):
        make_pools(open_dataset(dataset_folder), [Bucket(32, 48, 9)], tmp_path / "file" / "folder")


def test_records_have_what_sorting_needs() -> None:
    assert {"height", "width", "frames"} <= set(RECORD.names or ())
