"""Faults below the loader: bad samples and their replacements, broken tars, and a disk cache that processes share."""

from __future__ import annotations

import fcntl
import gzip
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from regen_dist.config.datasets import DataConfig
from regen_dist.data.build.foreign import index_name, index_tars
from regen_dist.data.format.catalogue import open_dataset
from regen_dist.data.format.index import Sample
from regen_dist.data.format.manifest import MANIFEST
from regen_dist.data.inspect.check import verify_dataset
from regen_dist.data.loading.cache import DiskCache
from regen_dist.errors import DataError
from tests.helpers.datasets import flip_byte, read, single, write_shards
from tests.unit.data.loading.test_cache import BLOCK, occupied, recorded


@pytest.fixture
def config(dataset_folder: Path) -> DataConfig:
    return single(dataset_folder)


@pytest.fixture
def damaged(config: DataConfig, dataset_folder: Path, tmp_path: Path) -> tuple[DataConfig, Sample]:
    """A copy of the dataset, with one byte of this sample flipped."""
    folder = tmp_path / "copy"
    shutil.copytree(dataset_folder, folder)
    sample = open_dataset(folder).sample(6)
    flip_byte(folder / sample.shard, sample.offset + 100)
    return config.model_copy(update={"url": str(folder), "image_fraction": 0.0}), sample


@pytest.mark.parametrize("workers", [0, 1])
def test_another_sample_stands_in_for_a_bad_one(
    config: DataConfig, damaged: tuple[DataConfig, Sample], workers: int
) -> None:
    bad, sample = damaged
    whole = read(config.model_copy(update={"image_fraction": 0.0}), 4, batch_global=11)
    found = read(bad.model_copy(update={"workers": workers}), 4, batch_global=11)
    for before, after in zip(whole, found, strict=True):
        slots = (before.sample_ids == sample.id).nonzero().flatten().tolist()
        assert len(slots) == 1, "an epoch is a batch here"
        others = [slot for slot in range(11) if slot not in slots]
        assert torch.equal(before.video[others], after.video[others])
        assert torch.equal(before.sample_ids[others], after.sample_ids[others])
        assert after.sample_ids[slots[0]] != sample.id
        assert [(each.shard, each.key) for each in after.bad] == [(sample.shard, sample.key)]
        assert after.bad[0].reason.startswith("the bytes differ from those that were written")
    assert (
        len(
            {
                int(batch.sample_ids[(before.sample_ids == sample.id)])
                for before, batch in zip(whole, found, strict=True)
            }
        )
        > 1
    )


def test_the_stand_in_is_the_same_however_the_work_is_divided(damaged: tuple[DataConfig, Sample]) -> None:
    bad, _ = damaged
    whole = read(bad, 4, batch_global=4)
    ranks = [
        read(bad.model_copy(update={"workers": rank}), 4, batch_global=4, rank=rank, world_size=2) for rank in (0, 1)
    ]
    for step, batch in enumerate(whole):
        parts = [ranks[0][step], ranks[1][step]]
        assert torch.equal(batch.sample_ids, torch.cat([part.sample_ids for part in parts]))
        assert torch.equal(batch.video, torch.cat([part.video for part in parts]))
    assert any(batch.bad for batch in whole)


def test_when_everything_is_bad_the_error_says_so(damaged: tuple[DataConfig, Sample]) -> None:
    bad, _ = damaged
    for shard in Path(str(bad.url)).glob("*.tar"):
        shard.unlink()
    with pytest.raises(DataError, match=r"8 samples were tried in place of \S+, each bad; the last: .*not found"):
        read(bad, 1)


# `regen shards index` on cut, damaged and compressed tars: each is named with the byte, the others are indexed.


def cut_payload(tar: Path) -> int:
    with tarfile.open(tar) as opened:
        at = opened.getmember("000005.mp4").offset_data + 100
    tar.write_bytes(tar.read_bytes()[:at])
    return at


def cut_header(tar: Path) -> int:
    tar.write_bytes(tar.read_bytes()[:200])
    return 200


def cut_boundary(tar: Path) -> int:
    with tarfile.open(tar) as opened:
        at = opened.getmembers()[4].offset
    tar.write_bytes(tar.read_bytes()[:at])
    return at


def damage_header(tar: Path) -> int:
    with tarfile.open(tar) as opened:
        at = opened.getmembers()[3].offset
    flip_byte(tar, at + 3)
    return at


def compress(tar: Path) -> int:
    tar.write_bytes(gzip.compress(tar.read_bytes()))
    return 0


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (cut_payload, "it ends at byte {at}, inside '000005.mp4', whose"),
        (cut_header, "it ends at byte {at}, inside the header at byte 0; copy the tar again"),
        (cut_boundary, "it ends at byte {at} without the blocks of zeros that close a tar: cut between two members"),
        (damage_header, "the header at byte {at} is damaged (bad checksum); copy the tar again"),
        (compress, "byte 0 begins a gzip stream"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_tar_is_named_and_the_others_are_indexed(tmp_path: Path, damage: Any, says: str, workers: int) -> None:
    tars = write_shards(tmp_path)
    whole = tars[1].read_bytes()
    at = damage(tars[1])
    with pytest.raises(DataError) as caught:
        index_tars(tmp_path, workers=workers)
    assert caught.value.exit_code == 3
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("1 of 3 tars cannot be used; the others are indexed, there is no manifest yet.")
    assert lines[0].endswith("leave them out with --skip-broken:")
    assert len(lines) == 2
    assert lines[1].startswith(f"  00001.tar: {says.format(at=at)}")
    assert not (tmp_path / MANIFEST).exists()
    assert [index_name(tar.name) for tar in tars if (tmp_path / index_name(tar.name)).exists()] == [
        "00000.index.parquet",
        "00002.index.parquet",
    ]
    without = index_tars(tmp_path, workers=workers, skip_broken=True)
    assert without.shards_made == 0
    assert [skip.source for skip in without.broken] == ["00001.tar"]
    assert without.manifest.skipped == without.broken
    assert without.manifest.totals.samples == len(open_dataset(tmp_path)) == 8
    assert verify_dataset(tmp_path, workers=0).notes == ()
    tars[1].write_bytes(whole)
    mended = index_tars(tmp_path, workers=workers)
    assert (mended.shards_made, mended.broken, mended.manifest.totals.samples) == (1, (), 12)


# The disk cache between processes: shared by busy ones, and left by killed ones.


HAMMER = """
import hashlib, random, sys
from regen_dist.data.loading.cache import DiskCache
disk, seed = DiskCache(sys.argv[1], int(sys.argv[2])), int(sys.argv[3])
generator, wrong = random.Random(seed), 0
for turn in range(1500):
    key = hashlib.sha256(b"%d" % generator.randrange(60)).hexdigest()
    expected = bytes.fromhex(key) * (1 + int(key[:4], 16) % 1500)
    data = disk.get(key)
    if data is None:
        disk.put(key, expected)
    elif data != expected:
        wrong += 1
print(wrong, disk.hits, disk.evicted, disk.failures)
"""

STALLED = """
import os, sys, time
from regen_dist.data.loading.cache import DiskCache
disk, write = DiskCache(sys.argv[1], int(sys.argv[2])), os.write
def half(descriptor, view):
    write(descriptor, view[: len(view) // 2])
    print("half", flush=True)
    time.sleep(600)
os.write = half
disk.put("stalled", bytes(8 * 4096))
"""


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@contextmanager
def standstill(folder: Path) -> Iterator[None]:
    """Holds what the processes agree by: a listing of a changing folder could count what was removed for what came."""
    with (folder / "usage").open("rb") as record:
        fcntl.flock(record, fcntl.LOCK_EX)
        yield


def entries(disk: DiskCache) -> int:
    return sum(1 for _ in Path(disk.folder).glob("??/*"))


def test_processes_share_one_bounded_cache(tmp_path: Path) -> None:
    limit = 400_000  # 60 values of 32 to 48000 bytes do not fit
    DiskCache(tmp_path, limit)
    hammers = [start(HAMMER, tmp_path, limit, seed) for seed in range(2)]
    sampled = []
    while any(hammer.poll() is None for hammer in hammers):
        with standstill(tmp_path):
            sampled.append(occupied(tmp_path))
        time.sleep(0.002)
    for hammer in hammers:
        wrong, hits, evicted, failures = map(int, hammer.communicate()[0].split())
        assert (hammer.returncode, wrong, failures) == (0, 0, 0)
        assert hits > 100
        assert evicted > 10
    assert max(sampled) <= limit
    assert max(sampled) > limit // 2
    assert os.listdir(tmp_path / "filling") == []


def test_what_a_killed_filler_leaves_is_removed_and_a_live_ones_is_not(tmp_path: Path) -> None:
    limit = 64 * BLOCK
    filler = start(STALLED, tmp_path, limit)
    assert filler.stdout is not None
    assert filler.stdout.readline() == "half\n"
    disk = DiskCache(tmp_path, limit)
    assert disk.get("stalled") is None
    for number in range(70):  # evicts more than once
        disk.put(str(number), bytes(BLOCK))
    assert len(os.listdir(tmp_path / "filling")) == 1
    assert occupied(tmp_path) <= limit

    filler.send_signal(signal.SIGKILL)
    filler.wait()
    assert disk.get("stalled") is None
    for number in range(70, 140):
        disk.put(str(number), bytes(BLOCK))
    assert os.listdir(tmp_path / "filling") == []
    assert recorded(disk) == entries(disk) * BLOCK  # the dead one's room is free again
    assert (disk.failures, disk.skipped) == (0, 0)
