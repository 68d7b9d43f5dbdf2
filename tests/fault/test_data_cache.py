"""The disk cache between processes: shared by busy ones, and left by killed ones."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from regen_dist.data.loading.cache import DiskCache
from tests.unit.data.loading.test_cache import BLOCK, occupied, recorded

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
