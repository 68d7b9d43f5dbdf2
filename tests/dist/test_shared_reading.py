"""Ranks that share samples get them from one of them, ahead of time, over a gloo group of their own."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist

from regen_dist.data.loading.clip_loader import ClipBatch
from regen_dist.errors import DataError, RegenError
from tests.helpers.ranks import run_ranks

TAKEN = 3  # items before a rank computes, or closes


class Findings(NamedTuple):
    """One rank's findings; `broadcasts` are (group's backend, whether it is the feed alone, whether in a thread)."""

    videos: list[Any]
    ids: list[list[int]]
    replaced: list[int]
    read_ahead: int
    broadcasts: set[tuple[str, bool, bool]]
    again: list[int]
    errors: list[str]
    threads: list[str]


def test_batches_arrive_ahead_over_gloo_and_errors_with_them() -> None:
    """Two ranks take batches of random pixels, close in the middle and read again, then meet the end, an error of the
    data, a mistake in the source, and an item that cannot be sent."""
    first, second = run_ranks(_read, 2)
    for one, other in zip(first.videos, second.videos, strict=True):
        assert (one == other).all()
    assert [number for ids in first.ids for number in ids] == [1, 2, 3, 4, 5, 6]
    assert first.replaced == second.replaced == [0, 1, 2]
    for rank in (first, second):
        assert rank.ids == first.ids
        assert rank.read_ahead == TAKEN + 2  # two more than were taken, while this rank computed
        assert rank.broadcasts == {("gloo", True, True)}
        assert rank.again == [0, 1, 2]
        assert rank.threads == []
    assert first.errors[:2] == ["bad sample", "a mistake"]
    assert second.errors[:2] == ["bad sample", "ValueError: a mistake"]
    assert all("pickle" in rank.errors[2] for rank in (first, second))


def test_a_rank_that_fails_leaves_the_others_in_seconds() -> None:
    """The reading rank stops early: the other's next item is an error which says so. The other way round, the reading
    rank closes without waiting for the one that has failed."""
    assert run_ranks(_stop_early, 2) == ["closed", "rank 0, which reads for this one, stopped; its own output says why"]
    assert max(run_ranks(_fail, 2)) < 20


def _batches(made: list[int]) -> Generator[ClipBatch]:
    generator = torch.Generator().manual_seed(dist.get_rank())
    for number in range(100):
        made.append(number)
        video = torch.randint(0, 256, (2, 3, 5, 8, 8), dtype=torch.uint8, generator=generator)
        ids = torch.tensor([2 * number + 1, 2 * number + 2])
        yield ClipBatch(video, ids, torch.zeros(2, dtype=torch.int64), num_replaced=number)


def _numbers(end: int, error: Exception | None = None) -> Generator[Any]:
    yield from range(end)
    if error is not None:
        raise error


def _read() -> Findings:
    from regen_dist.distributed.ranks import process_group, read_environment
    from regen_dist.distributed.sequence_parallel import join_rows

    ranks = read_environment()
    made, seen = list[int](), set[tuple[str, bool, bool]]()
    with process_group(ranks, needed=True), _recorded(seen) as groups:
        rows = join_rows(ranks, 2)
        groups.update(feed=rows._reader.group, others=(rows.group, None, dist.group.WORLD))
        batches = rows.read(lambda: _batches(made))
        found = list(islice(batches, TAKEN))
        deadline = time.monotonic() + 20
        while rows.leads and len(made) < TAKEN + 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)  # there is no room for more
        counts = ranks.gather(len(made))
        batches.close()
        again, errors = list(rows.read(lambda: _numbers(3))), []
        for source in (
            lambda: _numbers(1, DataError("bad sample")),
            lambda: _numbers(1, ValueError("a mistake")),
            lambda: (lambda number=number: number for number in range(2)),  # does not pickle
        ):
            try:
                list(rows.read(source))
            except Exception as error:  # noqa: BLE001 - compared by the test
                errors.append(str(error))
        ranks.barrier()
        threads = [thread.name for thread in threading.enumerate() if thread.name == "shared reading"]
    videos, ids = [batch.video.numpy() for batch in found], [batch.sample_ids.tolist() for batch in found]
    replaced = [batch.num_replaced for batch in found]
    return Findings(videos, ids, replaced, counts[0], seen, again, errors, threads)


@contextmanager
def _recorded(seen: set[tuple[str, bool, bool]]) -> Iterator[dict[str, Any]]:
    """Note every broadcast between ranks: its group, and whether it runs beside the main thread."""
    groups: dict[str, Any] = {}
    broadcast = dist.broadcast

    def noted(tensor: torch.Tensor, src: int, group: Any = None) -> None:
        alone = group is groups["feed"] and group not in groups["others"]
        seen.add((dist.get_backend(group), alone, threading.current_thread() is not threading.main_thread()))
        broadcast(tensor, src=src, group=group)

    with mock.patch.object(dist, "broadcast", noted):
        yield groups


def _stop_early() -> str:
    from regen_dist.distributed.ranks import process_group, read_environment
    from regen_dist.distributed.sequence_parallel import join_rows

    ranks = read_environment()
    with process_group(ranks, needed=True):
        rows = join_rows(ranks, 2)
        items = rows.read(lambda: _numbers(100))
        try:
            for taken, _ in enumerate(items, 1):
                if rows.leads and taken == TAKEN:
                    items.close()
                    return "closed"
        except RegenError as error:
            return str(error)
    raise AssertionError("the other rank went on without an error")


def _fail() -> float:
    """Seconds that closing takes on a rank whose partner has failed, or that has failed itself."""
    from regen_dist.distributed.ranks import process_group, read_environment
    from regen_dist.distributed.rendezvous import report_failure
    from regen_dist.distributed.sequence_parallel import join_rows

    ranks = read_environment()
    with process_group(ranks, needed=True):
        rows = join_rows(ranks, 2)
        items = rows.read(lambda: _numbers(100))
        next(items)
        ranks.barrier()
        if not rows.leads:
            report_failure(RuntimeError("out of memory"), ranks.rank, ranks.world_size)
        begun = time.monotonic()
        if not rows.leads:
            items.close()
            seconds = time.monotonic() - begun
            ranks.barrier()
            return seconds
        ranks.barrier()
        items.close()
        return time.monotonic() - begun
