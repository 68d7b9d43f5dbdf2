"""Bytes of samples, ahead of the decoder: from the local cache or by range requests, joined, repeated, checked.

One `Fetcher` serves one decoding process. It works on windows of batches: while one window is decoded, the next one is
fetched by several threads, so that at most `ahead_mb` are held however slow the decoder or the store is.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

from regen_dist.config.run import ReadConfig
from regen_dist.data.format.catalogue import Dataset, SampleRow, cache_folder
from regen_dist.data.loading.cache import DiskCache
from regen_dist.data.storage.connection import limits_of
from regen_dist.errors import AccessDenied, DataError, StoreUnavailable

_RETRIES = 2  # of a sample whose bytes are wrong: the wire or the cache may have spoilt them
_FIRST_WINDOW_BYTES = 1 << 20  # small, so that the first batch is soon there; each window may be twice the last


class SampleLocation(NamedTuple):
    """A sample of one of several datasets."""

    dataset: int
    row: SampleRow


class Bytes(NamedTuple):
    """What came of a sample: its video file, or the reason why there is none."""

    data: bytes
    problem: str | None = None


Item = TypeVar("Item")
Wanted = tuple[Item, Sequence[SampleLocation]]


class Fetcher:
    """Reads samples of `datasets`. A context manager: leaving it ends its threads.

    Raises (from every method that gives bytes):
        AccessDenied, StoreUnavailable: the store, not a sample, is at fault; nothing can stand in for that.
    """

    def __init__(self, datasets: Sequence[Dataset], config: ReadConfig) -> None:
        self._datasets, self._config = datasets, config
        self._cache = _cache(config)
        self._threads = ThreadPoolExecutor(config.requests, thread_name_prefix="fetch")
        for dataset in datasets:
            dataset.store.limits = dataset.shards.limits = limits_of(config)

    def __enter__(self) -> Fetcher:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def ahead(self, wanted: Iterable[Wanted[Item]]) -> Generator[tuple[Item, list[Bytes]]]:
        """For each item its samples' bytes, in the order asked for, with the next window of items on its way."""
        current: list[tuple[Item, list[Future[Bytes]]]] = []
        for window in self._windows(iter(wanted)):
            coming = self._start(window)
            yield from _arrived(current)
            current = coming
        yield from _arrived(current)

    def one(self, place: SampleLocation) -> Bytes:
        """A single sample, now."""
        return self._checked(place)

    @property
    def problem(self) -> str | None:
        """What keeps the cache from working, in words; reading goes on without it."""
        return None if self._cache is None else self._cache.problem

    def _windows(self, wanted: Iterator[Wanted[Item]]) -> Iterator[list[Wanted[Item]]]:
        most = self._config.ahead_mb * (1 << 20) // 2
        limit = min(_FIRST_WINDOW_BYTES, most)
        window: list[Wanted[Item]] = []
        held = 0
        for item, places in wanted:
            window.append((item, places))
            held += sum(place.row.size for place in places)
            if held >= limit:
                yield window
                window, held, limit = [], 0, min(2 * limit, most)
        if window:
            yield window

    def _start(self, window: Sequence[Wanted[Item]]) -> list[tuple[Item, list[Future[Bytes]]]]:
        """Begin to fetch all samples of a window, each once, those of a shard together."""
        shards: dict[tuple[int, str], dict[SampleLocation, Future[Bytes]]] = {}
        for _, places in window:
            for place in places:
                shards.setdefault((place.dataset, place.row.shard), {}).setdefault(place, Future())
        for futures in shards.values():
            self._threads.submit(self._fetch, futures)
        return [(item, [shards[place.dataset, place.row.shard][place] for place in places]) for item, places in window]

    def _fetch(self, futures: dict[SampleLocation, Future[Bytes]]) -> None:
        """Fulfil the futures of samples that lie in one shard."""
        try:
            missing = []
            for place, future in futures.items():
                if (data := self._cached(place)) is not None:
                    future.set_result(Bytes(data))
                else:
                    missing.append(place)
            for place, found in zip(missing, self._joined(missing), strict=True):
                futures[place].set_result(found)
        except BaseException as error:  # noqa: BLE001 - raised where the bytes are awaited; else that waits for ever
            for future in futures.values():
                if not future.done():
                    future.set_exception(error)

    def _joined(self, places: Sequence[SampleLocation]) -> Iterator[Bytes]:
        """By one joined request where that works; one by one where it does not, so that a bad sample stands alone."""
        if not places:
            return
        store, ranges = self._datasets[places[0].dataset].shards, [(p.row.offset, p.row.size) for p in places]
        try:
            found = store.get_ranges(places[0].row.shard, ranges, join_bytes=self._config.join_kb * 1024)
        except (AccessDenied, StoreUnavailable):
            raise
        except DataError:
            yield from map(self._checked, places)
            return
        for place, data in zip(places, found, strict=True):
            yield self._taken(place, data) or self._checked(place)

    def _checked(self, place: SampleLocation) -> Bytes:
        """A sample by a request of its own, tried again when its bytes are wrong."""
        problem = ""
        for _ in range(1 + _RETRIES):
            try:
                row = place.row
                data = self._datasets[place.dataset].shards.get_range(row.shard, row.offset, row.size)
                self._datasets[place.dataset].check(row, data)
            except (AccessDenied, StoreUnavailable):
                raise
            except DataError as error:
                problem = str(error)
            else:
                self._keep(place, data)
                return Bytes(data)
        return Bytes(b"", problem)

    def _taken(self, place: SampleLocation, data: bytes) -> Bytes | None:
        """The bytes, kept for later; None when they are not the right ones."""
        try:
            self._datasets[place.dataset].check(place.row, data)
        except DataError:
            return None
        self._keep(place, data)
        return Bytes(data)

    def _cached(self, place: SampleLocation) -> bytes | None:
        """From the cache, checked like everything else. What is on a local disk anyway is not kept twice."""
        if self._cache is None or self._datasets[place.dataset].shards.folder is not None:
            return None
        data = self._cache.get(place.row.checksum)
        if data is None:
            return None
        try:
            self._datasets[place.dataset].check(place.row, data)
        except DataError:
            self._cache.drop(place.row.checksum)
            return None
        return data

    def _keep(self, place: SampleLocation, data: bytes) -> None:
        if self._cache is not None and self._datasets[place.dataset].shards.folder is None:
            self._cache.put(place.row.checksum, data)


def _cache(config: ReadConfig) -> DiskCache | None:
    if config.cache is None:
        return None
    return DiskCache(cache_folder(config.cache) / "samples", int(config.cache_gb * 1e9))


def _arrived(waiting: list[tuple[Item, list[Future[Bytes]]]]) -> Iterator[tuple[Item, list[Bytes]]]:
    """Hand over a window, letting go of each batch as it is taken."""
    waiting.reverse()
    while waiting:
        item, futures = waiting.pop()
        yield item, [future.result() for future in futures]
