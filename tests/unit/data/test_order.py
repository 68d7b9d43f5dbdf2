from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pytest

from regen_dist.data.order import Order, draw_clip, fit_stride, permute
from regen_dist.errors import ConfigError, DataError


def union(order: Order, step: int, world_size: int, accumulation: int) -> list[tuple[int, int]]:
    """What all ranks read in a step, micro-batch by micro-batch, as (epoch, row)."""
    parts = [
        order.micro_batch(step, micro, accumulation, rank, world_size)
        for micro in range(accumulation)
        for rank in range(world_size)
    ]
    return [(int(epoch), int(row)) for part in parts for epoch, row in zip(part.epochs, part.rows, strict=True)]


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("step", [0, 1, 17, 10**9])
def test_ranks_and_accumulation_only_slice_the_global_batch(world_size: int, accumulation: int, step: int) -> None:
    order = Order(size=1001, batch_global=32, seed=5)
    whole = order.global_batch(step)
    expected = list(zip(whole.epochs.tolist(), whole.rows.tolist(), strict=True))
    assert union(order, step, world_size, accumulation) == expected


@pytest.mark.parametrize("size", [1, 2, 3, 5, 10, 63, 64, 65, 1000])
def test_every_epoch_holds_each_sample_once_and_batches_have_no_gaps(size: int) -> None:
    order = Order(size, batch_global=7, seed=0)
    batches = [order.global_batch(step) for step in range(3 * size)]
    seen = np.concatenate([batch.epochs * size + batch.rows for batch in batches])
    assert len(seen) == 21 * size
    assert sorted(seen.tolist()) == list(range(21 * size))


def test_a_batch_larger_than_the_dataset_runs_over_several_epochs() -> None:
    batch = Order(size=3, batch_global=8, seed=1).global_batch(0)
    assert batch.epochs.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert sorted(batch.rows[:3].tolist()) == [0, 1, 2]


def test_seed_and_epoch_change_the_order() -> None:
    rows = [Order(1000, 1000, seed).global_batch(epoch).rows.tolist() for seed in (0, 1, 2**63 - 1) for epoch in (0, 1)]
    assert len({tuple(row) for row in rows}) == 6


def test_each_place_gets_each_row_about_equally_often() -> None:
    size, epochs = 10, 4000
    places, numbers = np.tile(np.arange(size), epochs), np.repeat(np.arange(epochs), size)
    counts = np.zeros((size, size))
    np.add.at(counts, (places, permute(places, numbers, size, seed=3)), 1)
    chi_square = ((counts - epochs / size) ** 2 / (epochs / size)).sum()
    assert chi_square < 140  # 81 degrees of freedom: mean 81, and 99.99 % of draws below 136


def test_neighbours_are_spread_over_the_whole_dataset() -> None:
    rows = Order(100_000, 100_000, 0).global_batch(0).rows
    assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(np.arange(100_000), rows)[0, 1]) < 0.02


def test_a_million_samples_are_planned_in_under_a_second_and_a_far_step_needs_no_walk() -> None:
    started = time.process_time()
    rows = Order(1_000_000, 1_000_000, 0).global_batch(0).rows
    assert time.process_time() - started < 1.0
    assert len(np.unique(rows)) == 1_000_000
    tracemalloc.start()
    Order(10**12, 1024, 0).global_batch(10**8)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


@pytest.mark.parametrize(("fraction", "expected"), [(0.0, 0), (0.1, 100), (0.25, 250), (1 / 3, 333), (1.0, 1000)])
def test_image_batches_come_in_the_ratio_and_evenly(fraction: float, expected: int) -> None:
    order = Order(10, 4, 0, image_fraction=fraction)
    kinds = [order.global_batch(step).image for step in range(1000)]
    assert sum(kinds) == expected
    tenths = [sum(kinds[start : start + 100]) for start in range(0, 1000, 100)]
    assert max(tenths) - min(tenths) <= 1


def test_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"batch_global 12 is not a multiple of world size 4 x train\.accumulation 2"):
        Order(100, 12, 0).micro_batch(0, 0, accumulation=2, rank=0, world_size=4)


def test_cursor_inside_a_batch_is_refused() -> None:
    order = Order(100, 12, 0)
    assert order.step_of(24) == 2
    with pytest.raises(ConfigError, match=r"not a multiple of train\.batch_global"):
        order.step_of(25)


def test_an_empty_dataset_is_refused() -> None:
    with pytest.raises(DataError, match="no samples"):
        Order(0, 1, 0)


def test_clip_draws_depend_on_seed_epoch_and_sample_alone() -> None:
    draws = {(s, e, i): draw_clip(s, e, i, 1000, 9, (1, 2, 3)) for s in (0, 1) for e in (0, 1) for i in (5, 2**63 - 1)}
    assert len(set(draws.values())) == 8
    for (seed, epoch, sample), drawn in draws.items():
        assert draw_clip(seed, epoch, sample, 1000, 9, (1, 2, 3)) == drawn


def test_clip_draws_cover_what_is_allowed() -> None:
    draws = [draw_clip(0, 0, sample, 20, 9, (1, 2)) for sample in range(500)]
    assert {draw.start for draw in draws if draw.stride == 1} == set(range(12))
    assert {draw.start for draw in draws if draw.stride == 2} == set(range(4))
    assert 200 < sum(draw.flip for draw in draws) < 300
    assert all(0 <= draw.crop_y < 1 and 0 <= draw.crop_x < 1 for draw in draws)


def test_a_stride_that_does_not_fit_gives_way_to_the_largest_that_does() -> None:
    assert fit_stride(4, (1, 2, 4), frames=33, num_frames=9) == 4
    assert fit_stride(4, (1, 2, 4), frames=32, num_frames=9) == 2
    assert fit_stride(4, (4,), frames=30, num_frames=9) == 3
    assert fit_stride(4, (4,), frames=1, num_frames=1) == 4
    with pytest.raises(DataError, match="--min-frames 9"):
        fit_stride(1, (1,), frames=8, num_frames=9)
