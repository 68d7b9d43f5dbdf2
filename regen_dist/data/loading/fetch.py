"""Prefetching of samples' bytes from the local cache or by range requests: merged, retried and verified.

One `Fetcher` serves one decoding process. It works on windows of batches: while one window is decoded, the next one is
fetched by several threads, so that at most `ahead_mb` are held even if the decoder or the store is slow.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

from regen_dist.config.datasets import ReadConfig
from regen_dist.data.format.catalogue import Dataset, SampleRow, cache_folder
from regen_dist.data.format.index import check_bytes
from regen_dist.data.loading.cache import DiskCache
from regen_dist.data.storage.connection import limits_of
from regen_dist.errors import AccessDenied, DataError, StoreUnavailable

_RETRIES = 2  # of a sample with wrong bytes: the network or the cache may have corrupted them
_PART_BYTES = 4 << 20  # of a shard that one thread fetches and verifies: several do so side by side
_FIRST_WINDOW_BYTES = 1 << 20  # small, for a fast first batch; each window may be twice the last


class SampleLocation(NamedTuple):
    """Location of a sample: its dataset and row."""

    dataset: int
    row: SampleRow


class FetchResult(NamedTuple):
    """Result of fetching a sample: its bytes, or the reason of the failure."""

    data: bytes
    problem: str | None = None


Item = TypeVar("Item")
Wanted = tuple[Item, Sequence[SampleLocation]]


class Fetcher:
    """Fetcher of samples of `datasets`. A context manager: leaving it ends its threads.

    Raises (from every method that returns bytes):
        AccessDenied, StoreUnavailable: the store is at fault, not a sample; there is no replacement for that.
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

    def ahead(self, wanted: Iterable[Wanted[Item]]) -> Generator[tuple[Item, list[FetchResult]]]:
        """Yield each item with its samples' bytes, in order, while the next window of items is fetched."""
        current: list[tuple[Item, list[Future[FetchResult]]]] = []
        for window in self._windows(iter(wanted)):
            coming = self._start(window)
            yield from _arrived(current)
            current = coming
        yield from _arrived(current)

    @property
    def problem(self) -> str | None:
        """Return a message on why the cache does not work; None if it does. Reading continues without it."""
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

    def _start(self, window: Sequence[Wanted[Item]]) -> list[tuple[Item, list[Future[FetchResult]]]]:
        """Start fetching all samples of a window, each once, grouped by shard, in parts of neighbours."""
        shards: dict[tuple[int, str], dict[SampleLocation, Future[FetchResult]]] = {}
        for _, places in window:
            for place in places:
                shards.setdefault((place.dataset, place.row.shard), {}).setdefault(place, Future())
        for futures in shards.values():
            for part in _parts(futures):
                self._threads.submit(self._fetch, part)
        return [(item, [shards[place.dataset, place.row.shard][place] for place in places]) for item, places in window]

    def _fetch(self, futures: dict[SampleLocation, Future[FetchResult]]) -> None:
        try:
            missing = []
            for place, future in futures.items():
                if (data := self._cached(place)) is not None:
                    future.set_result(FetchResult(data))
                else:
                    missing.append(place)
            for place, found in zip(missing, self._joined(missing), strict=True):
                futures[place].set_result(found)
        except BaseException as error:  # noqa: BLE001 - raised where the bytes are awaited, which would otherwise wait forever
            for future in futures.values():
                if not future.done():
                    future.set_exception(error)

    def _joined(self, places: Sequence[SampleLocation]) -> Iterator[FetchResult]:
        """Yield samples from one merged request, or one by one if that fails, so that only the bad sample fails."""
        if not places:
            return
        store, ranges = self._datasets[places[0].dataset].shards, [(p.row.offset, p.row.size) for p in places]
        try:
            found = store.get_ranges(places[0].row.shard, ranges, join_bytes=self._config.join_kb * 1024)
        except (AccessDenied, StoreUnavailable):
            raise
        except DataError:
            yield from map(self.one, places)
            return
        for place, data in zip(places, found, strict=True):
            try:
                result = self._accepted(place, data)
            except DataError:
                result = self.one(place)
            yield result

    def one(self, place: SampleLocation) -> FetchResult:
        """Fetch a single sample immediately, by its own request, retried if its bytes are wrong."""
        problem = ""
        for _ in range(1 + _RETRIES):
            try:
                row = place.row
                data = self._datasets[place.dataset].shards.get_range(row.shard, row.offset, row.size)
                return self._accepted(place, data)
            except (AccessDenied, StoreUnavailable):
                raise
            except DataError as error:
                problem = str(error)
        return FetchResult(b"", problem)

    def _accepted(self, place: SampleLocation, data: bytes) -> FetchResult:
        """Check the bytes, and store them in the cache; DataError if they are wrong."""
        check_bytes(place.row, data, self._datasets[place.dataset].store.url)
        if (cache := self._cache_of(place)) is not None:
            cache.put(place.row.checksum, data)
        return FetchResult(data)

    def _cached(self, place: SampleLocation) -> bytes | None:
        """Return a sample's verified bytes from the cache."""
        cache = self._cache_of(place)
        data = None if cache is None else cache.get(place.row.checksum)
        if cache is None or data is None:
            return None
        try:
            check_bytes(place.row, data, self._datasets[place.dataset].store.url)
        except DataError:
            cache.drop(place.row.checksum)
            return None
        return data

    def _cache_of(self, place: SampleLocation) -> DiskCache | None:
        """Return the cache for a sample: none where it lies on a local disk."""
        return self._cache if self._datasets[place.dataset].shards.folder is None else None


def _cache(config: ReadConfig) -> DiskCache | None:
    if config.cache is None:
        return None
    return DiskCache(cache_folder(config.cache) / "samples", int(config.cache_gb * 1e9))


def _parts(futures: dict[SampleLocation, Future[FetchResult]]) -> Iterator[dict[SampleLocation, Future[FetchResult]]]:
    """Yield the samples of one shard in parts of `_PART_BYTES`, in order of offset, so that neighbours share a request
    as before."""
    part: dict[SampleLocation, Future[FetchResult]] = {}
    size = 0
    for place in sorted(futures, key=lambda place: place.row.offset):
        if part and size + place.row.size > _PART_BYTES:
            yield part
            part, size = {}, 0
        part[place] = futures[place]
        size += place.row.size
    yield part


def _arrived(waiting: list[tuple[Item, list[Future[FetchResult]]]]) -> Iterator[tuple[Item, list[FetchResult]]]:
    """Yield the batches of a window, releasing each as it is taken."""
    waiting.reverse()
    while waiting:
        item, futures = waiting.pop()
        yield item, [future.result() for future in futures]
