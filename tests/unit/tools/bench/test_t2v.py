"""What `regen bench t2v` measures is what it says, whatever feeds the steps."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from regen_dist.config.t2v import LatentDataConfig
from regen_dist.data.loading.datasets import LatentSet
from regen_dist.data.loading.latent_loader import LatentBatch, latent_batches
from regen_dist.errors import DataError
from tests.helpers.latents import write_cache
from tools.bench.common import Turn
from tools.bench.t2v import (
    CACHE,
    ENCODER,
    MEMORY,
    READER,
    WARM_STEPS,
    compare,
    kept,
    over_and_over,
    section,
    steps_per_second,
    table,
    texts_of,
)


class Source:
    """Batches that take so long to come, and what became of them."""

    def __init__(self, each_s: float) -> None:
        self.each_s, self.taken, self.closed = each_s, 0, False

    def batches(self) -> Generator[LatentBatch]:
        try:
            while True:
                time.sleep(self.each_s)
                self.taken += 1
                yield LatentBatch(*[torch.zeros(1)] * 5)
        finally:
            self.closed = True


def step(batches: Iterator[LatentBatch]) -> None:
    """Two micro-batches."""
    for _ in islice(batches, 2):
        pass


def test_a_turn_counts_steps_and_waiting_after_the_warm_ones() -> None:
    source = Source(0.002)
    turn = steps_per_second(step, source.batches(), seconds=0.05)
    assert source.taken == 2 * (WARM_STEPS + turn.amount)
    assert turn.seconds >= 0.05
    assert turn.facts["data_wait"] > 0.5, "the steps do nothing but wait"
    assert source.closed


def test_a_turn_has_a_step_however_short_and_closes_what_fails() -> None:
    assert steps_per_second(step, Source(0.0).batches(), seconds=0.0).amount == 1
    source = Source(0.0)

    def fails(batches: Iterator[LatentBatch]) -> None:
        next(batches)
        raise DataError("broken")

    with pytest.raises(DataError, match="broken"):
        steps_per_second(fails, source.batches(), seconds=0.0)
    assert source.closed


def test_every_feed_has_its_turn_in_every_round() -> None:
    sources = {name: Source(0.0) for name in (MEMORY, CACHE, ENCODER)}
    on_turn: list[str] = []
    found = compare(
        step, next, {name: source.batches for name, source in sources.items()}, seconds=0.0, repeats=2,
        on_turn=lambda name, turn: on_turn.append(name),
    )  # fmt: skip
    assert on_turn == [MEMORY, CACHE, ENCODER, READER] * 2
    of_steps, read = 2 * 2 * (WARM_STEPS + 1), 2 * (WARM_STEPS + 1)
    taken = {name: source.taken for name, source in sources.items()}
    assert taken == {MEMORY: of_steps, CACHE: of_steps + read, ENCODER: of_steps}
    cases = found["cases"]
    first = cases[CACHE]["turns"][0] / cases[ENCODER]["turns"][0]
    assert found["ratios"][ENCODER]["min"] <= first <= found["ratios"][ENCODER]["max"]


def turns(amount: float, *seconds: float, cpu_s: float) -> list[Turn]:
    return [Turn(amount, each, {"own_cpu_s": cpu_s, "data_wait": 0.25}) for each in seconds]


@pytest.fixture
def found() -> dict[str, Any]:
    """In the second round everything takes ten times as long by the clock, because others are at work."""
    rounds = {
        MEMORY: turns(100, 10, 100, cpu_s=10),
        CACHE: turns(96, 10, 100, cpu_s=12),
        ENCODER: turns(24, 10, 100, cpu_s=30),
        READER: turns(5000, 10, 100, cpu_s=10),
    }
    return section(rounds)


def test_ratios_are_those_of_each_round_by_the_clock_and_by_cpu_time(found: dict[str, Any]) -> None:
    assert found["ratios"][MEMORY] == {"median": 0.96, "min": 0.96, "max": 0.96}
    assert found["ratios"][ENCODER]["median"] == pytest.approx(4.0)
    assert found["by_cpu"][MEMORY]["median"] == pytest.approx(0.8)
    assert found["by_cpu"][ENCODER]["median"] == pytest.approx(10.0)
    assert found["cases"][CACHE]["turns"] == [9.6, 0.96]


def test_the_tables_tell_speeds_the_target_and_sizes(found: dict[str, Any]) -> None:
    data = {
        "videos": 8, "frames": 17, "side": 64, "source_bytes": 1000, "pixel_bytes": 20000, "cache_bytes": 500,
        "text_bytes": 100,
    }  # fmt: skip
    text = table(json.loads(json.dumps({"training": found, "data": data})))
    ratios = "0.96 (0.96 to 0.96) | 0.80 (0.80 to 0.80)"
    assert f"| {MEMORY} | 5.50 (1.00 to 10.00) | 25.0% | {ratios} | ≥ 0.95 |" in text
    assert f"| {CACHE} | 5.28 (0.96 to 9.60) | 25.0% |  |  |  |" in text
    assert f"| {READER} | 275.00 (50.00 to 500.00) |  |  |  |  |" in text
    assert "| 8 videos of 17 frames of 64x64 | 1,000 | 1.00 |" in text
    assert f"| {CACHE} | 500 | 0.50 |" in text


def open_set(cache: Path) -> LatentSet:
    return LatentSet(LatentDataConfig(url=str(cache)), batch_global=4, seed=0)


def test_what_is_kept_is_what_the_reader_gives_over_and_over(tmp_path: Path) -> None:
    data = open_set(write_cache(tmp_path))
    batches = latent_batches(data, accumulation=1, rank=0, world_size=1, cursor=0)
    held = kept(batches, 2)
    ids = [batch.sample_ids.tolist() for batch in islice(over_and_over(held), 4)]
    assert ids[0] != ids[1]
    assert ids == ids[:2] * 2
    assert next(batches, None) is None, "its thread has ended"


def test_the_texts_are_those_of_the_entries(tmp_path: Path) -> None:
    data = open_set(write_cache(tmp_path / "text"))
    texts = texts_of(data)
    (batch,) = kept(latent_batches(data, accumulation=1, rank=0, world_size=1, cursor=0), 1)
    assert len(texts) == 8
    assert batch.text is not None
    for number, row in zip(batch.sample_ids.tolist(), batch.text, strict=True):
        text = texts[number][0].float()
        assert torch.equal(row[: len(text)], text)
    with pytest.raises(DataError, match="an entry without text"):
        texts_of(open_set(write_cache(tmp_path / "none", text_width=None)))
