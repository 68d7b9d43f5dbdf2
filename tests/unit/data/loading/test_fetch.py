"""Fetching ahead: order, joining, repeating, bounded memory, and errors that arrive."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest

from regen_dist.config.datasets import ReadConfig
from regen_dist.data.format.catalogue import Dataset, SampleRow
from regen_dist.data.format.index import checksum
from regen_dist.data.loading.fetch import Fetcher, FetchResult, SampleLocation
from regen_dist.errors import AccessDenied, DataError, ObjectCut, StoreUnavailable
from tests.helpers.jobs import wait_until

SIZE = 1000


def content(row: int, size: int = SIZE) -> bytes:
    return (row.to_bytes(4, "big") * (size // 4 + 1))[:size]


class Shards:
    """A store whose shards hold ten samples each. `trouble(row, times asked)` gives other bytes, or raises."""

    folder, url = None, "there"

    def __init__(self, size: int = SIZE) -> None:
        self.size, self.calls, self.lock = size, [], threading.Lock()  # type: ignore[var-annotated]
        self.asked: dict[int, int] = {}
        self.given_bytes = 0
        self.limits = None
        self.trouble: Callable[[int, int], bytes | None] = lambda row, times: None

    def get_ranges(self, name: str, ranges: Sequence[tuple[int, int]], join_bytes: int = 0) -> list[bytes]:
        rows = [int(name) * 10 + offset // self.size for offset, _ in ranges]
        with self.lock:
            self.calls.append((name, rows))
            for row in rows:
                self.asked[row] = self.asked.get(row, 0) + 1
            found = [self.trouble(row, self.asked[row]) or content(row, self.size) for row in rows]
            self.given_bytes += sum(map(len, found))
        return found

    def get_range(self, name: str, offset: int, size: int) -> bytes:
        return self.get_ranges(name, [(offset, size)])[0]


class Rows:
    """Stands for a `Dataset`."""

    def __init__(self, shards: Shards) -> None:
        self.shards = self.store = shards

    def check(self, row: SampleRow, data: bytes) -> None:
        Dataset.check(cast(Any, self), row, data)


def place(row: int, size: int = SIZE) -> SampleLocation:
    number, slot = divmod(row, 10)
    return SampleLocation(
        0, SampleRow(row, row, str(number), slot * size, size, checksum(content(row, size)), 1, 1, 1, 1.0)
    )


def fetcher(shards: Shards, **settings: Any) -> Fetcher:
    return Fetcher([cast(Dataset, Rows(shards))], ReadConfig(**settings))


def fetch(shards: Shards, batches: Sequence[Sequence[int]], **settings: Any) -> list[tuple[int, list[FetchResult]]]:
    with fetcher(shards, **settings) as each:
        return list(each.ahead((n, [place(row) for row in rows]) for n, rows in enumerate(batches)))


def test_batches_come_in_the_order_asked_for() -> None:
    batches = [[17, 3, 99], [4], [3, 12, 3]]
    found = fetch(Shards(), batches)
    assert found == [(n, [FetchResult(content(row)) for row in rows]) for n, rows in enumerate(batches)]


def test_a_shard_is_asked_once_for_what_is_wanted_of_it() -> None:
    shards = Shards()
    fetch(shards, [[3, 17], [18, 3, 4], [3]])
    assert sorted(shards.calls) == [("0", [3, 4]), ("1", [17, 18])]


def test_much_of_a_shard_is_asked_in_parts_side_by_side() -> None:
    """Ten samples of 1 MB in any order: four at a time at most, neighbours together, two requests at once."""
    together = threading.Barrier(2, timeout=30)

    class Meeting(Shards):
        def get_ranges(self, name: str, ranges: Sequence[tuple[int, int]], join_bytes: int = 0) -> list[bytes]:
            found = super().get_ranges(name, ranges, join_bytes)
            if len(self.calls) <= 2:  # with one request after the other they would not meet
                together.wait()
            return found

    shards, size = Meeting(1 << 20), 1 << 20
    with fetcher(shards, requests=2) as each:
        order = [7, 0, 3, 9, 1, 2, 8, 5, 4, 6]
        found = list(each.ahead([("all", [place(row, size) for row in order])]))
    assert found == [("all", [FetchResult(content(row, size)) for row in order])]
    assert sorted(rows for _, rows in shards.calls) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_nothing_is_fetched_for_nothing() -> None:
    assert fetch(Shards(), []) == []


@pytest.mark.parametrize("times", [1, 2])
def test_wrong_bytes_are_asked_for_again(times: int) -> None:
    shards = Shards()
    shards.trouble = lambda row, asked: b"x" * SIZE if row == 4 and asked <= times else None
    assert fetch(shards, [[3, 4, 5]]) == [(0, [FetchResult(content(row)) for row in (3, 4, 5)])]
    assert shards.asked == {3: 1, 4: times + 1, 5: 1}


def test_what_stays_wrong_is_told_and_alone() -> None:
    shards = Shards()
    shards.trouble = lambda row, asked: b"x" * SIZE if row == 4 else None
    (_, found), = fetch(shards, [[3, 4, 5]])  # fmt: skip
    assert [each.problem is None for each in found] == [True, False, True]
    assert "the bytes differ from those that were written" in (found[1].problem or "")
    assert shards.asked[4] == 4, "once with its neighbours, and three times alone"


def test_one_bad_sample_does_not_spoil_its_neighbours() -> None:
    class Cut(Shards):
        def get_ranges(self, name: str, ranges: Sequence[tuple[int, int]], join_bytes: int = 0) -> list[bytes]:
            if any(offset >= 5 * self.size for offset, _ in ranges):
                raise ObjectCut("the object is cut")
            return super().get_ranges(name, ranges, join_bytes)

    (_, found), = fetch(Cut(), [[4, 5, 6, 14]])  # fmt: skip
    assert found == [FetchResult(content(4)), *[FetchResult(b"", "the object is cut")] * 2, FetchResult(content(14))]


@pytest.mark.parametrize("error", [AccessDenied("no"), StoreUnavailable("no"), RuntimeError("a bug")])
def test_an_error_of_the_store_is_raised_where_its_bytes_are_due(error: Exception) -> None:
    class Broken(Shards):
        def get_ranges(self, name: str, ranges: Sequence[tuple[int, int]], join_bytes: int = 0) -> list[bytes]:
            if name == "2":
                raise error
            return super().get_ranges(name, ranges, join_bytes)

    with fetcher(Broken()) as each:
        found = each.ahead((row, [place(row)]) for row in (1, 11, 21, 31))
        assert [next(found)[0], next(found)[0]] == [1, 11]
        with pytest.raises(type(error), match=str(error)):
            next(found)


def test_one_sample_raises_what_the_store_does() -> None:
    class Denied(Shards):
        def get_range(self, name: str, offset: int, size: int) -> bytes:
            raise AccessDenied("no")

    with fetcher(Denied()) as each, pytest.raises(AccessDenied):
        each.one(place(1))


def test_no_more_is_held_than_allowed() -> None:
    """However slowly the batches are taken: at most `ahead_mb`, and what the last batches ran over by."""
    size, batch = 100_000, 4
    shards = Shards(size)
    most, taken = 0, 0

    def ahead() -> int:
        return shards.given_bytes - taken * batch * size

    with fetcher(shards, ahead_mb=4) as each:
        wanted = ((n, [place(n * batch + slot, size) for slot in range(batch)]) for n in range(60))
        for taken, (_, found) in enumerate(each.ahead(wanted), start=1):
            assert len(found) == batch
            if taken == 5:
                wait_until(lambda: ahead() > 2 << 20, lambda: "it does not fetch ahead")
            threading.Event().wait(0.005)
            most = max(most, ahead())
    assert shards.given_bytes == 60 * batch * size
    assert most <= (4 << 20) + 2 * batch * size


def test_the_first_batch_waits_for_little() -> None:
    shards = Shards(100_000)
    with fetcher(shards, ahead_mb=1000, requests=1) as each:
        next(each.ahead((n, [place(n, 100_000)]) for n in range(1000)))
        assert shards.given_bytes < 10 << 20


def test_its_threads_end() -> None:
    before = threading.active_count()
    fetch(Shards(), [[1, 11, 21, 31]])
    for thread in threading.enumerate():
        if thread.name.startswith("fetch"):
            thread.join(10)
    assert threading.active_count() <= before


def test_patience_is_that_of_the_config() -> None:
    shards = Shards()
    with fetcher(shards, stall_s=1.5, deadline_s=7.0):
        assert (shards.limits.stall_s, shards.limits.deadline_s) == (1.5, 7.0)  # type: ignore[attr-defined]


def test_a_cache_folder_that_cannot_be_used_is_told(tmp_path: Any) -> None:
    (tmp_path / "samples").touch()
    with pytest.raises(DataError, match=r"the cache folder .*samples cannot be used"):
        fetcher(Shards(), cache=str(tmp_path))
