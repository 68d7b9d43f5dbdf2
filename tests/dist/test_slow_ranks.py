"""A run of two real ranks, of which one reads slowly: its log, its record and its tracker name it."""

from __future__ import annotations

import socket
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from regen_dist.config import AnyRunConfig
from regen_dist.observe.record import read_record
from tests.dist.conftest import START_S
from tests.helpers.latents import write_cache
from tests.helpers.ranks import Job, run_ranks, train_jobs
from tests.helpers.tiny import tiny_t2v

pytestmark = pytest.mark.timeout(1200)

SLOW_S = 0.3


def _train(config: AnyRunConfig) -> list[Any]:
    """As any run, but that rank 1 gets its batches late."""
    from regen_dist.training.loop import Trainer

    batches = Trainer.open_batches

    def late(self: Trainer) -> Generator[Any]:
        for batch in batches(self):
            time.sleep(SLOW_S * self.ranks.rank)
            yield batch

    Trainer.open_batches = late  # type: ignore[method-assign]
    return train_jobs([Job(config)])


def test_the_slow_rank_is_named(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cache = write_cache(tmp_path / "cache")
    config = tiny_t2v(
        tmp_path, cache, engine__kind="zero3", train__steps=4, train__slow_ranks_every=2, tensorboard__enabled=True
    )
    assert run_ranks(_train, 2, config, timeout_s=START_S) == [[0], [0]]
    told = [line for line in read_record(config.folder / "metrics.jsonl", "event") if "ranks, min" in line["event"]]
    assert [line["step"] for line in told] == [2, 4]
    for line in told:
        waits = line["event"].split("; ")[0]
        assert f"(most: rank 1 on {socket.gethostname()} " in waits
        assert waits.index("rank 1 on") < waits.index("rank 0 on")
    board = EventAccumulator(str(config.folder / "tensorboard"))
    board.Reload()
    most, least = (board.Scalars(f"ranks/data_wait_s_{end}") for end in ("max", "min"))
    assert [each.step for each in most] == [2, 4]
    assert all(each.value >= SLOW_S for each in most)
    assert all(low.value < high.value - SLOW_S / 2 for low, high in zip(least, most, strict=True))
    assert len(board.Scalars("train/loss")) == 4
