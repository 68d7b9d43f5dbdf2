"""Bytes of samples per second: by our `Fetcher`, in any order, checked; and by obstore alone, which fetches the same
ranges and does nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from regen_dist.config.schema import ReadConfig
from regen_dist.config.urls import parse_url
from regen_dist.data.dataset.catalogue import Dataset, open_dataset
from regen_dist.data.objects.connection import Limits, open_backend
from regen_dist.data.reading.fetching import Bytes, Fetcher, Place
from regen_dist.errors import DataError
from regen_dist.evaluation.data_speed.turns import Turn, measured, turn_of

_BATCH = 16  # samples that are asked for together


def shuffled_rows(dataset: Dataset, seed: int = 0) -> list[int]:
    """Every row once, as a training run would ask for them."""
    return [int(row) for row in np.random.default_rng(seed).permutation(len(dataset))]


def by_fetcher(url: str, config: ReadConfig, rows: Sequence[int], store: int | None = None) -> Turn:
    """Bytes per second of one `Fetcher`. `store` is the store's process.

    Raises:
        DataError: a sample's bytes were wrong.
    """
    dataset = open_dataset(url, config.cache)
    with Fetcher([dataset], config) as fetcher, measured(store) as costs:
        found = [each for _, batch in fetcher.ahead(_batches(dataset, rows)) for each in map(_size, batch)]
    return turn_of(sum(found), costs, samples=len(found))


def by_obstore(url: str, config: ReadConfig, rows: Sequence[int], store: int | None = None) -> Turn:
    """Bytes per second of obstore alone: one request a sample, as many at once as `config.requests`."""
    import obstore

    dataset = open_dataset(url, config.cache)
    backend = open_backend(parse_url(url), Limits(config.stall_s, config.deadline_s))
    ranges = [(row.shard, row.offset, row.size) for row in map(dataset.row, rows)]

    def fetch(wanted: tuple[str, int, int]) -> int:
        name, offset, size = wanted
        return len(obstore.get_range(backend, name, start=offset, length=size))

    with ThreadPoolExecutor(config.requests) as threads, measured(store) as costs:
        found = list(threads.map(fetch, ranges))
    return turn_of(sum(found), costs, samples=len(found))


def by_obstore_many(url: str, config: ReadConfig, rows: Sequence[int], store: int | None = None) -> Turn:
    """As `by_obstore`, with all ranges of a shard given to obstore at once: it makes its own concurrency."""
    import obstore

    dataset = open_dataset(url, config.cache)
    backend = open_backend(parse_url(url), Limits(config.stall_s, config.deadline_s))
    shards: dict[str, list[tuple[int, int]]] = {}
    for row in map(dataset.row, rows):
        shards.setdefault(row.shard, []).append((row.offset, row.size))

    def fetch(name: str) -> list[int]:
        starts, lengths = zip(*shards[name], strict=True)
        found = obstore.get_ranges(backend, name, starts=starts, lengths=lengths, coalesce=0)
        return [len(each) for each in found]

    with ThreadPoolExecutor(config.requests) as threads, measured(store) as costs:
        found = [size for sizes in threads.map(fetch, shards) for size in sizes]
    return turn_of(sum(found), costs, samples=len(found))


def _batches(dataset: Dataset, rows: Sequence[int]) -> Iterator[tuple[int, list[Place]]]:
    for start in range(0, len(rows), _BATCH):
        yield start, [Place(0, dataset.row(row)) for row in rows[start : start + _BATCH]]


def _size(found: Bytes) -> int:
    if found.problem is not None:
        raise DataError(f"a benchmark needs a whole dataset: {found.problem}")
    return len(found.data)
