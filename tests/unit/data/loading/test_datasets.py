"""Training sets: samples in their buckets, mixtures, and clips that do not depend on ranks and workers."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from regen_dist.config.datasets import DataConfig, SourceConfig
from regen_dist.config.identity import order_changes
from regen_dist.data.format.catalogue import RECORD, Dataset, open_dataset
from regen_dist.data.format.manifest import Skip
from regen_dist.data.loading import datasets as module
from regen_dist.data.loading.datasets import PoolRows, TrainingSet, best_size, make_pools
from regen_dist.data.loading.plan import BatchPlan
from regen_dist.data.order.order import Bucket, DataOrder
from regen_dist.errors import DataError
from tests.helpers.datasets import SIZES, draw_shapes, mixed_with, read

FOUR_SIZES = [(32, 32), (32, 64), (64, 32), (64, 64)]


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
    best = best_size(np.array([height], np.int32), np.array([width], np.int32), FOUR_SIZES)
    assert FOUR_SIZES[int(best[0])] == expected
    others = FOUR_SIZES[::-1]
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


# Buckets and mixtures end to end: which clips a run sees, however it is cut into ranks and workers.


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_shapes(tmp_path_factory.mktemp("shapes"))


@pytest.fixture
def mixed(dataset_folder: Path, shapes: Path) -> DataConfig:
    return mixed_with(dataset_folder, shapes)


def made(config: DataConfig, **changes: Any) -> TrainingSet:
    return TrainingSet(config, **{"num_frames": 9, "batch_global": 8, "seed": 3} | changes)


def test_each_batch_has_one_shape_and_each_video_its_best(mixed: DataConfig) -> None:
    data = made(mixed)
    best = {(bucket.height, bucket.width) for bucket in data.buckets}
    assert best == set(SIZES)
    seen = Counter(data.order.global_batch(step).bucket for step in range(48))
    assert set(seen) == set(data.buckets)
    assert sum(count for bucket, count in seen.items() if bucket.is_image) == 12
    for step in range(48):
        batch = data.order.global_batch(step)
        for place in data.places(batch):
            aspect = np.sign(place.row.width - place.row.height)
            assert aspect == np.sign(batch.bucket.width - batch.bucket.height)
            assert place.row.frames >= batch.bucket.frames


def test_clips_have_the_shape_of_their_bucket(mixed: DataConfig) -> None:
    data = made(mixed)
    found = read(mixed, 12)
    assert len({batch.video.shape for batch in found}) >= 4
    for step, batch in enumerate(found):
        assert batch.video.shape == (8, 3, *[data.order.global_batch(step).bucket[i] for i in (2, 0, 1)])
        assert batch.video.float().std() > 1


def test_weights_are_shares_of_the_samples(mixed: DataConfig) -> None:
    data = made(mixed)
    drawn = Counter(np.concatenate([data.order.global_batch(step).datasets for step in range(300)]).tolist())
    assert drawn[0] / drawn.total() == pytest.approx(2 / 3, abs=0.01)


def test_every_sample_of_a_bucket_comes_before_any_comes_again(mixed: DataConfig) -> None:
    data = made(mixed)
    epochs: dict[tuple[int, int, int], list[int]] = {}
    for step in range(120):
        batch = data.order.global_batch(step)
        for dataset, epoch, row in zip(batch.datasets, batch.epochs, batch.rows, strict=True):
            epochs.setdefault((batch.stream, int(dataset), int(epoch)), []).append(int(row))
    for rows in epochs.values():
        assert len(set(rows)) == len(rows)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("step", [0, 2, 10, 12_345])
def test_ranks_and_workers_cut_the_same_global_batches(
    mixed: DataConfig, world_size: int, workers: int, step: int
) -> None:
    data = made(mixed)
    expected = [data.places(data.order.global_batch(number)) for number in range(step, step + 3)]
    for accumulation in (1, 8 // world_size):
        found: list[list[Any]] = [[] for _ in range(3)]
        plans = [BatchPlan(data, step, accumulation, rank, world_size) for rank in range(world_size)]
        lines = [_as_workers_do(plan, 3 * accumulation, workers) for plan in plans]
        for number in range(3 * accumulation):
            for line in lines:
                found[number // accumulation] += data.places(line[number])
        assert found == expected


def _as_workers_do(plan: BatchPlan[TrainingSet], number: int, workers: int) -> list[Any]:
    """The first micro-batches of a rank, each worker going through every n-th by itself."""
    lines = [plan.part(worker, workers or 1) for worker in range(workers or 1)]
    return [next(lines[index % len(lines)]) for index in range(number)]


def test_a_worker_plans_its_own_batches_alone(mixed: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of sixteen workers: five micro-batches cost five plans, not eighty."""
    planned, micro_batch = list[int](), DataOrder.micro_batch

    def counted(order: DataOrder, step: int, *place: int) -> Any:
        planned.append(step)
        return micro_batch(order, step, *place)

    monkeypatch.setattr(DataOrder, "micro_batch", counted)
    found = list(islice(BatchPlan(made(mixed), 7, 2, 0, 1).part(3, 16), 5))
    assert planned == [batch.step for batch in found] == [7 + (3 + 16 * turn) // 2 for turn in range(5)]


def check_pixels(config: DataConfig, world_size: int, cursor: int, **changes: Any) -> None:
    """The ranks' clips, put together, are those of one rank in one process."""
    whole = read(config, 2, cursor=cursor)
    divided = config.model_copy(update=changes)
    parts = [read(divided, 2, cursor=cursor, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step, expected in enumerate(whole):
        for name in ("video", "sample_ids", "epochs"):
            found = torch.cat([getattr(rank[step], name) for rank in parts])
            assert torch.equal(found, getattr(expected, name))


def test_the_pixels_are_the_same_too(mixed: DataConfig) -> None:
    check_pixels(mixed, world_size=8, cursor=80)


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "data sizes": ({"buckets": SIZES[:2]}, {}),
    "frames of a clip": ({}, {"num_frames": 5}),
    "data.image_fraction": ({"image_fraction": 0.5}, {}),
    "data.short_side": ({"short_side": 48}, {}),
    "data.stride": ({"stride": (2, 1)}, {}),
    "data.flip": ({"flip": False}, {}),
    "train.batch_global": ({}, {"batch_global": 16}),
    "train.seed": ({}, {"seed": 4}),
}


@pytest.mark.parametrize("name", list(OPTIONS))
def test_what_changes_the_clips_changes_the_identity(mixed: DataConfig, name: str) -> None:
    of_data, others = OPTIONS[name]
    before, after = made(mixed).identity(), made(mixed.model_copy(update=of_data), **others).identity()
    assert [key for key in before if before[key] != after[key]] == [name]


def test_weights_order_and_datasets_are_part_of_the_identity(mixed: DataConfig) -> None:
    before = made(mixed).identity()
    first, second = mixed.mixture
    facts = "frames, sizes and sources of the samples"
    for mixture, changed in (
        (_weighed([first, second], [3.0, 1.0]), ["data.mixture weights"]),
        (_weighed([second, first], [2.0, 1.0]), ["dataset fingerprint", facts]),
        (_weighed([first], [1.0]), ["dataset fingerprint", "data.mixture weights", facts]),
    ):
        after = made(mixed.model_copy(update={"mixture": mixture})).identity()
        assert [key for key in before if before[key] != after[key]] == changed


def _weighed(sources: list[SourceConfig], weights: list[float]) -> tuple[SourceConfig, ...]:
    return tuple(source.model_copy(update={"weight": each}) for source, each in zip(sources, weights, strict=True))


def test_what_does_not_change_the_clips_does_not_change_the_identity(
    mixed: DataConfig, tmp_path: Path, dataset_folder: Path
) -> None:
    before = made(mixed).identity()
    spelt = [source.model_copy(update={"url": f"{Path(source.url).as_uri()}/"}) for source in mixed.mixture]
    reading = mixed.read.model_copy(update={"cache": str(tmp_path), "ahead_mb": 1, "join_kb": 0, "requests": 1})
    values = {"mixture": tuple(spelt), "workers": 3, "prefetch": 9, "read": reading, "max_bad_share": 0.5}
    assert made(mixed.model_copy(update=values)).identity() == before


def test_it_crosses_to_workers_small_however_large_the_data(
    dataset_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A million rows of a thousand shards, in two buckets; the catalogue is made up, the rest is real."""
    monkeypatch.setenv("REGEN_CACHE", str(tmp_path))
    small, rows = open_dataset(dataset_folder), 1_000_000
    records = np.zeros(rows, RECORD)
    records["id"], records["shard"], records["frames"] = np.arange(rows), np.arange(rows) // 1000, 20
    records["height"], records["width"] = 64, np.where(np.arange(rows) % 3, 64, 128)
    np.save(tmp_path / "large.npy", records)
    one = small.manifest.shards[0].model_copy(update={"samples": 1000})
    shards = tuple(one.model_copy(update={"name": f"s-{n}.tar", "index": f"s-{n}.parquet"}) for n in range(1000))
    skipped = tuple(Skip(source=f"video {number}", reason="too short") for number in range(20_000))
    totals = small.manifest.totals.model_copy(update={"samples": rows})
    manifest = small.manifest.model_copy(update={"shards": shards, "skipped": skipped, "totals": totals})
    monkeypatch.setattr(module, "open_dataset", lambda *_: Dataset(small.store, manifest, tmp_path / "large.npy"))
    data = made(DataConfig(url="there", buckets=((32, 32), (32, 64)), workers=0))
    before = data.places(data.order.global_batch(5))
    sent = pickle.dumps(data)
    assert len(sent) < 1_000_000, "the shards' names and sums, and no rows"
    copy = pickle.loads(sent)
    assert copy.places(copy.order.global_batch(5)) == before
    assert copy.identity() == data.identity()
    assert sorted(stream.sizes for stream in data.order.streams) == [(333_334,), (666_666,)]


def test_other_frames_of_the_same_bytes_change_the_identity(mixed: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tar that is indexed again by another version of a decoder: the samples' bytes, and the fingerprint, stay."""
    before, opened = made(mixed).identity(), module.open_dataset

    def indexed_again(*args: Any, facts: str | None) -> Dataset:
        dataset = opened(*args)
        described = facts and dataset.manifest.described.model_copy(update={"facts": facts})
        return Dataset(
            dataset.store, dataset.manifest.model_copy(update={"described": described or None}), dataset.catalogue
        )

    monkeypatch.setattr(module, "open_dataset", partial(indexed_again, facts="others"))
    (changed,) = order_changes(before, made(mixed).identity())
    assert "frames, sizes and sources of the samples was" in changed
    monkeypatch.setattr(module, "open_dataset", partial(indexed_again, facts=None))
    assert order_changes(before, made(mixed).identity()) == [], "a manifest older than the field"
