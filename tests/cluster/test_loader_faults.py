"""The loader on a store that makes faults: the same clips in the same order, the documented stand-in, or one clear
error; in bounded time, with nothing half-written in the cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch

from regen_dist.config.datasets import DataConfig, ReadConfig
from regen_dist.data.format.catalogue import Dataset, open_dataset
from regen_dist.data.format.index import Sample, checksum
from regen_dist.data.loading.clip_loader import ClipBatch
from regen_dist.data.loading.validation import validation_clip
from regen_dist.data.storage.store import Store
from regen_dist.data.synthetic.dataset import build_synthetic
from regen_dist.data.synthetic.shapes import SyntheticOptions
from regen_dist.errors import AccessDenied, DataError, StoreUnavailable
from regen_dist.observe.record import read_record
from regen_dist.training.run import train
from tests.helpers.datasets import forget_environment, read, start, worker_ids
from tests.helpers.machine import small_disk, wait_until_gone
from tests.helpers.proxy import Kind
from tests.helpers.stores import Proxied, use
from tests.helpers.tiny import tiny_run
from tools.local_services.s3 import ObjectServer

SAMPLES = 25  # three shards of eight, and one of a single sample
LAST = "shapes-000003-000000.tar"
STALL_S, DEADLINE_S = 0.4, 8.0


@pytest.fixture(scope="module")
def url(object_store: ObjectServer) -> Iterator[str]:
    """A dataset in the store. Read it, do not change it."""
    url = f"s3://{object_store.bucket}/shapes-{uuid4().hex[:8]}"
    with pytest.MonkeyPatch.context() as patch:
        use(patch, object_store.environment())
        options = SyntheticOptions(SAMPLES, seed=1, side=48, frames=12, samples_per_shard=8)
        build_synthetic(url, options, workers=0)
        assert LAST in Store(url).list()
        yield url


@pytest.fixture(autouse=True)
def own_environment(bucket_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Workers have the environment of their test, and catalogues lie in its folder."""
    monkeypatch.setenv("REGEN_CACHE", str(tmp_path / "catalogues"))
    forget_environment()
    yield
    forget_environment()


def settings(url: str, cache: Path | None = None, **changes: Any) -> DataConfig:
    """Little patience, no joining, no cache unless told; `changes` are of `DataConfig` or of `ReadConfig`."""
    reading: dict[str, Any] = {"stall_s": STALL_S, "deadline_s": DEADLINE_S, "join_kb": 0}
    reading["cache"] = cache and str(cache)
    reading |= {name: changes.pop(name) for name in list(changes) if name in ReadConfig.model_fields}
    return DataConfig.model_validate({"url": url, "size": (32, 40), "workers": 0, "read": reading} | changes)


@pytest.fixture(scope="module")
def expected(url: str, tmp_path_factory: pytest.TempPathFactory) -> list[ClipBatch]:
    """Six batches, almost two epochs, without faults."""
    return read(settings(url, tmp_path_factory.mktemp("expected")), 6)


def assert_equal(found: list[ClipBatch], expected: list[ClipBatch]) -> None:
    assert [batch.sample_ids.tolist() for batch in found] == [batch.sample_ids.tolist() for batch in expected]
    assert all(torch.equal(a.video, b.video) for a, b in zip(found, expected, strict=True))
    assert [batch.bad for batch in found] == [()] * len(expected)


def assert_whole(cache: Path, dataset: Dataset, least: int) -> None:
    """The cache holds what the index says; nothing is half-written."""
    files = [path for path in (cache / "samples").rglob("*") if path.is_file() and path.name != "usage"]
    assert len(files) >= least
    known = {dataset.row(row).checksum for row in range(len(dataset))}
    for path in files:
        assert path.parent.name == path.name[:2], "nothing is left of an interrupted fill"
        assert path.name in known
        assert checksum(path.read_bytes()) == path.name


FAULTS: dict[str, tuple[Kind, dict[str, Any]]] = {
    "503": ("status", {"status": 503, "times": 3}),
    "dropped": ("drop", {"times": 3}),
    "reset": ("reset", {"times": 3}),
    "short": ("short", {"times": 3}),
    "stall": ("stall", {"times": 2, "seconds": 60.0}),
    "slow": ("slow", {"times": 3, "bytes_per_s": 40_000}),
    "wrong": ("wrong", {"times": 2}),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_fault_changes_nothing(
    fault: str, url: str, expected: list[ClipBatch], proxied: Proxied, tmp_path: Path
) -> None:
    kind, how = FAULTS[fault]
    with proxied() as proxy:
        proxy.add(kind, ".tar", **how)
        begun = time.monotonic()
        assert_equal(read(settings(url, tmp_path / "cache"), 6), expected)
        assert time.monotonic() - begun < 2 * DEADLINE_S
        assert proxy.injected == {kind: how["times"]}
    assert_whole(tmp_path / "cache", open_dataset(url), SAMPLES)


def test_all_faults_together_change_nothing_for_workers(
    url: str, expected: list[ClipBatch], proxied: Proxied, tmp_path: Path
) -> None:
    with proxied() as proxy:
        for kind, how in FAULTS.values():
            proxy.add(kind, ".tar", **how | {"times": 1, "every": 2})
        begun = time.monotonic()
        assert_equal(read(settings(url, tmp_path / "cache", workers=2), 6), expected)
        assert time.monotonic() - begun < 60
        assert set(proxy.injected) == {kind for kind, _ in FAULTS.values()}
        proxy.clear()
        assert_whole(tmp_path / "cache", open_dataset(url), SAMPLES)
        assert_equal(read(settings(url, tmp_path / "cache"), 6), expected)
        assert [request for request in proxy.requests if ".tar" in request.target] == [], "the workers shared the cache"


def test_joined_requests_change_nothing(url: str, expected: list[ClipBatch], proxied: Proxied) -> None:
    with proxied() as proxy:
        proxy.add("wrong", ".tar", times=3)
        proxy.add("short", ".tar", times=1)
        assert_equal(read(settings(url, join_kb=256), 6), expected)
        assert proxy.injected == {"wrong": 3, "short": 1}


def stood_in(found: list[ClipBatch], expected: list[ClipBatch], bad: set[int]) -> int:
    """How many clips stand in for samples of these ids; all others must be as they were."""
    count = 0
    for before, after in zip(expected, found, strict=True):
        for slot, sample in enumerate(before.sample_ids.tolist()):
            if sample in bad:
                assert after.sample_ids[slot].item() not in bad
                count += 1
            else:
                assert after.sample_ids[slot] == sample
                assert torch.equal(after.video[slot], before.video[slot])
        assert after.num_replaced == sum(sample in bad for sample in before.sample_ids.tolist())
    return count


def test_a_sample_that_is_always_wrong_has_a_stand_in(
    url: str, expected: list[ClipBatch], proxied: Proxied, tmp_path: Path
) -> None:
    sample = open_dataset(url).sample(SAMPLES - 1)
    with proxied() as proxy:
        proxy.add("wrong", LAST)
        alone = read(settings(url, tmp_path / "cache"), 6)
        assert stood_in(alone, expected, {sample.id}) == 2
        told = [bad for batch in alone for bad in batch.bad]
        assert {(bad.shard, bad.key) for bad in told} == {(LAST, sample.key)}
        assert all("the bytes differ from those that were written" in bad.reason for bad in told)
        parts = [read(settings(url), 6, world_size=2, rank=rank) for rank in (0, 1)]
    both = [torch.cat([a.sample_ids, b.sample_ids]) for a, b in zip(*parts, strict=True)]
    assert [ids.tolist() for ids in both] == [batch.sample_ids.tolist() for batch in alone]
    assert_whole(tmp_path / "cache", open_dataset(url), SAMPLES - 1)


@pytest.fixture
def copy(url: str, bucket_url: str) -> str:
    """A copy of the dataset to spoil."""
    store = Store(url)
    for name in store.list():
        Store(bucket_url).put(name, store.get(name))
    return bucket_url


def test_a_missing_shard_has_stand_ins(url: str, copy: str, expected: list[ClipBatch]) -> None:
    shard = open_dataset(url).sample(0).shard
    Store(copy).delete(shard)
    lost = {open_dataset(url).sample(row).id for row in range(8)}
    found = read(settings(copy), 6)
    assert stood_in(found, expected, lost) >= 8
    told = [bad for batch in found for bad in batch.bad]
    assert {bad.shard for bad in told} == {shard}
    assert all("not found" in bad.reason for bad in told)


def _boundary(samples: list[Sample]) -> int:
    """Where the members of the sample before the sixth end, and those of the sixth begin."""
    return min(samples[5].offset, samples[4].offset + -(-samples[4].size // 512) * 512)


CUTS: dict[str, Callable[[list[Sample]], int]] = {
    "member boundary": _boundary,
    "header": lambda samples: samples[5].offset - 300,
    "payload": lambda samples: samples[5].offset + samples[5].size // 2,
}


@pytest.mark.parametrize("cut", list(CUTS))
def test_a_cut_shard_loses_only_what_is_cut(cut: str, url: str, copy: str, expected: list[ClipBatch]) -> None:
    samples = [open_dataset(url).sample(row) for row in range(8)]
    shard = samples[0].shard
    assert [sample.shard for sample in samples] == [shard] * 8
    assert [sample.offset for sample in samples] == sorted(sample.offset for sample in samples)
    store = Store(copy)
    store.put(shard, store.get(shard)[: CUTS[cut](samples)])
    for join_kb in (0, 256):
        found = read(settings(copy, join_kb=join_kb), 6)
        assert stood_in(found, expected, {sample.id for sample in samples[5:]}) >= 3
        told = {(bad.shard, bad.key): bad.reason for batch in found for bad in batch.bad}
        assert set(told) == {(shard, sample.key) for sample in samples[5:]}
        assert all(
            shard in reason and ("shorter" in reason or "the object is cut" in reason) for reason in told.values()
        ), told


@pytest.mark.parametrize("workers", [0, 1])
def test_a_store_that_never_answers_is_given_up(url: str, proxied: Proxied, workers: int) -> None:
    with proxied() as proxy:
        proxy.add("stall", ".tar", seconds=100.0)
        batches = start(settings(url, workers=workers, deadline_s=1.5))
        begun = time.monotonic()
        with pytest.raises(
            StoreUnavailable, match=r"\.tar: could not read it in \d+ s \(last: no bytes came in time\)"
        ):
            next(batches)
        assert time.monotonic() - begun < 30
        assert proxy.injected["stall"] > 1


def test_a_store_that_never_answers_cannot_be_opened(url: str, proxied: Proxied) -> None:
    """`data.read.deadline_s` holds for manifest and indices as well, of the training and of the validation data."""
    with proxied() as proxy:
        proxy.add("late", seconds=100.0)
        begun = time.monotonic()
        with pytest.raises(StoreUnavailable):
            read(settings(url, deadline_s=1.0), 1)
        with pytest.raises(StoreUnavailable):
            validation_clip(settings(url, deadline_s=1.0), num_frames=9)
        assert time.monotonic() - begun < 20


def test_a_run_that_ends_does_not_wait_for_a_slow_store(url: str, proxied: Proxied) -> None:
    """The worker has answers outstanding, fetched ahead, that would take it ten minutes."""
    with proxied() as proxy:
        with closing(start(settings(url, workers=1, stall_s=100.0, deadline_s=100.0))) as batches:
            next(batches)
            proxy.add("late", ".tar", seconds=100.0)
            workers, begun = worker_ids(batches), time.monotonic()
            while not proxy.injected:  # a window is asked for while the one before it, of many batches, is decoded
                assert time.monotonic() - begun < 20, len(proxy.requests)
                next(batches)
        wait_until_gone(workers)
        assert time.monotonic() - begun < 40


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_stands_in_for_a_store_that_lets_nobody_in(url: str, proxied: Proxied, workers: int) -> None:
    with proxied() as proxy:
        proxy.add("status", ".tar", status=403)
        with pytest.raises(AccessDenied, match=r"\.tar: access denied when trying to read \(HTTP 403"):
            read(settings(url, workers=workers, max_bad_share=1.0), 1)


def test_a_full_disk_under_the_cache_is_one_warning(
    url: str, expected: list[ClipBatch], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    size = sum(open_dataset(url).row(row).size for row in range(SAMPLES))
    with small_disk(tmp_path / "disk", f"{size // 2000}k") as disk:
        found = read(settings(url, disk), 6)
        assert_equal(found, expected)
        assert "No space left on device; reading continues without it" in (found[-1].problem or "")
        assert_whole(disk, open_dataset(url), 3)
    with small_disk(tmp_path / "other", f"{size // 2000}k") as disk:
        run = tiny_run(tmp_path / "runs", url, data__read={"cache": str(disk)}, train__steps=8)
        assert train(run) == 0
    assert capfd.readouterr().err.count("No space left on device; reading continues without it") == 1


def test_a_full_disk_under_the_catalogue_is_one_clear_error(url: str, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        (disk / "filler").write_bytes(bytes(64 << 10))
        with pytest.raises(
            DataError, match=r"the dataset's catalogue cannot be written: No space left on device; make"
        ):
            open_dataset(url, disk)
        left = sorted(path.name for path in disk.rglob("*") if path.is_file())
        assert [name for name in left if not name.endswith(".lock")] == ["filler"]


def test_a_bad_sample_in_a_run_is_noted_once_and_counted(
    url: str, proxied: Proxied, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sample, steps = open_dataset(url).sample(SAMPLES - 1), 25
    run = tiny_run(tmp_path, url, data__max_bad_share=0.5, train__steps=steps, train__trace_samples=True)
    with proxied() as proxy:
        proxy.add("wrong", LAST)
        assert train(run) == 0
        noted = read_record(run.folder / "bad_samples" / "rank-00000.jsonl")
        assert [(line["shard"], line["key"]) for line in noted] == [(LAST, sample.key)]
        assert "the bytes differ" in noted[0]["reason"]
        counted = [line["bad_samples"] for line in read_record(run.folder / "metrics.jsonl", "train")]
        assert sum(counted) == steps * 4 // SAMPLES == 4
        trained = [i for line in read_record(run.folder / "samples" / "rank-00000.jsonl") for i in line["ids"]]
        assert sample.id not in trained
        assert capfd.readouterr().err.count(f"warning: sample {sample.key} in {LAST} is bad") == 1
        strict = run.model_copy(update={"name": "strict", "data": run.data.model_copy(update={"max_bad_share": 0.0})})
        with pytest.raises(
            DataError, match=r"step \d: 1 of \d+ samples could not be read, data\.max_bad_share allows 0"
        ):
            train(strict)
    assert (strict.folder / "bad_samples" / "rank-00000.jsonl").exists()
