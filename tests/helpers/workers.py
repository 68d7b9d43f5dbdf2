"""Decoding workers of loaders in tests."""

from __future__ import annotations

from collections.abc import Generator
from itertools import islice
from multiprocessing import forkserver
from typing import Any

from regen_dist.config.datasets import DataConfig
from regen_dist.data.loading.clip_loader import ClipBatch, clip_batches
from regen_dist.data.loading.datasets import TrainingSet


def forget_environment() -> None:
    """End the process that workers are forked from: it has the environment of the first test that had workers."""
    forkserver._forkserver._stop()  # type: ignore[attr-defined]


def start(config: DataConfig, **changes: Any) -> Generator[ClipBatch]:
    """A loader: batches of 8 clips of 9 frames, one rank, from the beginning; `changes` are of these."""
    of_set: dict[str, Any] = {"num_frames": 9, "batch_global": 8, "seed": 3}
    of_rank: dict[str, Any] = {"accumulation": 1, "rank": 0, "world_size": 1, "cursor": 0}
    data = TrainingSet(config, **{name: changes.get(name, value) for name, value in of_set.items()})
    return clip_batches(data, **{name: changes.get(name, value) for name, value in of_rank.items()})


def read(config: DataConfig, number: int, **changes: Any) -> list[ClipBatch]:
    """Its first batches."""
    iterator = start(config, **changes)
    try:
        return list(islice(iterator, number))
    finally:
        iterator.close()


def worker_ids(iterator: Any) -> list[int]:
    """The process ids of a started loader's workers."""
    return [int(worker.pid) for worker in iterator.gi_frame.f_locals["batches"]._workers]
