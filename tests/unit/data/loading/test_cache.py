from __future__ import annotations

import os
import pickle
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from regen_dist.data.loading import cache
from regen_dist.data.loading.cache import DiskCache
from regen_dist.errors import DataError

BLOCK = 4096


def occupied(folder: Path) -> int:
    """Bytes of all files, each counted once though it may move while we look."""
    sizes: dict[int, int] = {}
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            try:
                stat = os.stat(os.path.join(place, name))
            except FileNotFoundError:
                continue
            sizes[stat.st_ino] = stat.st_size if name != "usage" else 0
    return sum(sizes.values())


def recorded(disk: DiskCache) -> int:
    with open(os.path.join(disk.folder, "usage"), "rb") as file:
        return int.from_bytes(file.read(8), "little")


def set_age(disk: DiskCache, key: str, age_s: int) -> None:
    now = os.stat(disk.folder).st_mtime
    os.utime(disk.path(key), (now - age_s, now - age_s))


def test_values_come_back_whole(tmp_path: Path) -> None:
    disk = DiskCache(tmp_path / "a" / "cache", 100 * BLOCK)
    values = {"ab" * 16: b"one", "a name/with ../strange\x00signs": b"", "CD" * 16: bytes(range(256)) * 100}
    for key, value in values.items():
        assert disk.get(key) is None
        disk.put(key, memoryview(value))
    assert {key: disk.get(key) for key in values} == values
    assert (disk.hits, disk.misses, disk.failures, disk.problem) == (3, 3, 0, None)
    assert disk.path("ab" * 16) == str(tmp_path / "a" / "cache" / "ab" / ("ab" * 16))
    disk.put("ab" * 16, b"two")
    assert disk.get("ab" * 16) == b"two"
    disk.drop("ab" * 16)
    disk.drop("ab" * 16)
    assert disk.get("ab" * 16) is None
    assert disk.failures == 0


def test_another_process_gets_the_folder_and_its_own_counters(tmp_path: Path) -> None:
    disk = DiskCache(tmp_path, 100 * BLOCK)
    disk.put("one", b"1")
    disk.get("two")
    other: DiskCache = pickle.loads(pickle.dumps(disk))
    assert (other.limit_bytes, other.misses, other.get("one")) == (disk.limit_bytes, 0, b"1")
    assert len(pickle.dumps(disk)) < 500


def test_threads_share_it_too(tmp_path: Path) -> None:
    disk = DiskCache(tmp_path, 40 * BLOCK)

    def fill(first: int) -> None:
        for number in range(first, first + 100):
            disk.put(str(number), str(number).encode() * 500)

    threads = [threading.Thread(target=fill, args=(100 * index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert occupied(tmp_path) <= 40 * BLOCK
    assert disk.skipped == disk.failures == 0
    found = {str(number): disk.get(str(number)) for number in range(400)}
    assert {value for value in found.values() if value} == {key.encode() * 500 for key in found if found[key]}
    assert disk.hits >= 20


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    disk = DiskCache(tmp_path, 20 * BLOCK)
    for number in range(20):
        disk.put(str(number), bytes(BLOCK))
        set_age(disk, str(number), 1000 - number)
    assert disk.get("0") is not None  # now the most recent
    disk.put("new", bytes(BLOCK))
    assert disk.evicted == 3  # down to 90 %
    kept = {key for key in ["new", *map(str, range(20))] if disk.get(key) is not None}
    assert kept == {"new", "0", *map(str, range(4, 20))}


def test_hits_seldom_write(tmp_path: Path) -> None:
    disk = DiskCache(tmp_path, 20 * BLOCK)
    disk.put("one", b"1")
    set_age(disk, "one", 30)
    before = os.stat(disk.path("one")).st_mtime_ns
    disk.get("one")
    assert os.stat(disk.path("one")).st_mtime_ns == before
    set_age(disk, "one", 100)
    disk.get("one")
    assert os.stat(disk.path("one")).st_mtime_ns > before


@pytest.mark.parametrize("record", [None, b"", b"garbage", bytes(16), bytes(17)])
def test_a_damaged_record_is_made_again(tmp_path: Path, record: bytes | None) -> None:
    disk = DiskCache(tmp_path, 20 * BLOCK)
    for number in range(10):
        disk.put(str(number), bytes(BLOCK + 1))
    usage = tmp_path / "usage"
    if record is None:
        usage.unlink()
    else:
        usage.write_bytes(record)
    disk.put("one more", bytes(BLOCK))
    assert occupied(tmp_path) <= 20 * BLOCK
    assert disk.evicted > 0
    assert recorded(disk) == sum(2 if os.stat(path).st_size > BLOCK else 1 for path in tmp_path.glob("??/*")) * BLOCK


def test_a_record_from_before_the_machines_start_counts_for_nothing(tmp_path: Path) -> None:
    disk = DiskCache(tmp_path, 20 * BLOCK)
    disk.put("one", b"1")
    disk._boot = "another start"
    disk.put("two", b"2")
    assert recorded(disk) == 2 * BLOCK


def test_what_is_too_large_is_left_out(tmp_path: Path) -> None:
    disk = DiskCache(tmp_path, 16 * BLOCK)
    disk.put("large", bytes(2 * BLOCK + 1))
    disk.put("fits", bytes(2 * BLOCK))
    assert disk.get("large") is None
    assert disk.get("fits") is not None
    assert (disk.skipped, disk.problem) == (1, None)


def test_files_of_others_are_never_removed(tmp_path: Path) -> None:
    for name in ("ab/notes.txt", "notes.txt", "abc/" + "ab" * 16):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(30 * BLOCK))
    disk = DiskCache(tmp_path, 20 * BLOCK)
    for number in range(50):
        disk.put(str(number), bytes(BLOCK))
    assert all((tmp_path / name).exists() for name in ("ab/notes.txt", "notes.txt", "abc/" + "ab" * 16))
    assert disk.evicted > 20


def test_a_lock_that_is_never_freed_costs_a_second_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, stuck = DiskCache(tmp_path, 20 * BLOCK), DiskCache(tmp_path, 20 * BLOCK)
    monkeypatch.setattr(cache, "_LOCK_S", 0.05)
    disk.put("before", b"1")
    with stuck._usage():
        disk.put("during", b"1")
        assert disk.get("before") == b"1"
    assert (disk.skipped, disk.get("during")) == (1, None)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root, where mounting is allowed, can make a small disk (tmpfs)")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_disk_is_told_once_and_does_no_harm(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = DiskCache(small_disk, 100 << 20)  # more than there is
    for number in range(20):
        disk.put(str(number), bytes([number]) * 100_000)
    assert disk.problem is not None
    assert "No space left" in disk.problem
    assert disk.failures == 1  # then it pauses
    assert os.listdir(small_disk / "filling") == []
    held = [number for number in range(20) if disk.get(str(number)) is not None]
    assert len(held) >= 8
    assert all(disk.get(str(number)) == bytes([number]) * 100_000 for number in held)

    disk.drop(str(held[0]))
    monkeypatch.setattr(disk, "_paused_until", 0.0)
    disk.put("again", bytes(50_000))
    assert disk.get("again") == bytes(50_000)


def test_a_folder_that_vanishes_is_a_problem_not_an_error(tmp_path: Path) -> None:
    disk = DiskCache(tmp_path / "cache", 20 * BLOCK)
    os.rename(tmp_path / "cache", tmp_path / "moved")
    disk.put("one", b"1")
    assert disk.get("one") is None
    assert disk.failures == 1
    assert disk.problem is not None


def test_what_cannot_be_a_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="limit is 0 bytes; give it a positive size"):
        DiskCache(tmp_path, 0)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="name a folder on a local disk that"):
        DiskCache(tmp_path / "file" / "cache", 100)
