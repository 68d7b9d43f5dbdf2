"""The order of samples: batches, buckets, shares of a mixture, and replacement samples."""

from __future__ import annotations

import pickle
import time
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from itertools import count

import numpy as np
import pytest

from regen_dist.data.order import order as module
from regen_dist.data.order.order import (
    Bucket,
    BucketStream,
    DataOrder,
    MicroBatch,
    draw_clip,
    expected,
    fit_stride,
    quotas,
)
from regen_dist.errors import ConfigError, DataError

WIDE, TALL, LONG, IMAGE = Bucket(64, 96, 9), Bucket(96, 64, 9), Bucket(64, 96, 33), Bucket(64, 64, 1)
STREAMS = [
    BucketStream(WIDE, (100, 31, 2)),
    BucketStream(TALL, (0, 17, 1)),
    BucketStream(LONG, (40, 0, 3)),
    BucketStream(IMAGE, (9, 5, 30)),
]
Samples = list[tuple[int, int, int, int]]


def mixed(
    batch_global: int = 32, *, seed: int = 5, weights: tuple[float, ...] | None = None, images: float = 0.0
) -> DataOrder:
    return DataOrder(STREAMS, batch_global, seed, weights, images)


def stream_of(order: DataOrder, step: int) -> int:
    """The stream of a step's batch, without drawing the batch."""
    return int(order._batches.at(step, 1)[0][0])


def samples(batch: MicroBatch) -> Samples:
    """(stream, dataset, epoch, row) of each sample, in order."""
    columns = zip(batch.datasets.tolist(), batch.epochs.tolist(), batch.rows.tolist(), strict=True)
    return [(batch.stream, *sample) for sample in columns]


def plan(order: DataOrder, steps: range, accumulation: int, rank: int, world_size: int) -> list[MicroBatch]:
    """Samples that a rank reads in some steps."""
    return [
        order.micro_batch(step, micro, accumulation, rank, world_size)
        for step in steps
        for micro in range(accumulation)
    ]


def lines_of(order: DataOrder, num_steps: int) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """(epoch, row) in the order in which they come, for each line."""
    lines: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for step in range(num_steps):
        for stream, dataset, epoch, row in samples(order.global_batch(step)):
            lines.setdefault((stream, dataset), []).append((epoch, row))
    return lines


SETTINGS: dict[str, tuple[list[BucketStream], tuple[float, ...] | None, float]] = {
    "single": ([BucketStream(WIDE, (1001,))], None, 0.0),
    "tiny": ([BucketStream(WIDE, (3,))], None, 0.0),
    "buckets": (STREAMS, None, 0.0),
    "weights": (STREAMS, (1.0, 5.0, 0.5), 0.0),
    "images": (STREAMS, None, 0.3),
    "images alone": (STREAMS, None, 1.0),
    "all": (STREAMS, (0.2, 0.7, 0.1), 0.1),
}
ORDERS = {name: DataOrder(streams, 32, 5, weights, images) for name, (streams, weights, images) in SETTINGS.items()}


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (8, 1), (4, 2), (2, 4)])
def test_ranks_and_accumulation_only_slice_the_global_batch(name: str, world_size: int, accumulation: int) -> None:
    order = ORDERS[name]
    for step in (0, 1, 17, 10**9):
        whole = order.global_batch(step)
        parts = [
            order.micro_batch(step, micro, accumulation, rank, world_size)
            for micro in range(accumulation)
            for rank in range(world_size)
        ]
        assert [sample for part in parts for sample in samples(part)] == samples(whole)
        assert {(part.step, part.bucket, part.stream) for part in parts} == {(step, whole.bucket, whole.stream)}


@pytest.mark.parametrize("cursor", [0, 32, 7 * 32, 10**9 * 32])
def test_a_resumed_order_goes_on_with_the_same_batches_at_any_world_size(cursor: int) -> None:
    for order in ORDERS.values():
        first = order.step_of(cursor)
        expected = [samples(order.global_batch(step)) for step in range(first, first + 5)]
        for world_size in (1, 2, 4, 8):
            fresh = pickle.loads(pickle.dumps(order))
            ranks = [plan(fresh, range(first, first + 5), 1, rank, world_size) for rank in range(world_size)]
            merged = [
                [sample for batch in batches for sample in samples(batch)] for batches in zip(*ranks, strict=True)
            ]
            assert merged == expected


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("batch_global", [7, 500])
def test_each_line_goes_epoch_by_epoch_with_each_row_once(name: str, batch_global: int) -> None:
    streams, weights, images = SETTINGS[name]
    order = DataOrder(streams, batch_global, 0, weights, images)
    lines = lines_of(order, max(3000 // batch_global, 12))
    for (stream, dataset), seen in lines.items():
        size = order.streams[stream].sizes[dataset]
        for epoch in range(len(seen) // size + 1):
            rows = seen[epoch * size : (epoch + 1) * size]
            assert {number for number, _ in rows} <= {epoch}
            assert len({row for _, row in rows}) == len(rows)
            assert all(0 <= row < size for _, row in rows)
    kinds = {False} if not images else {True} if images == 1 else {False, True}
    drawn = [(stream, bucket.is_image in kinds, sizes) for stream, (bucket, sizes) in enumerate(streams)]
    assert set(lines) == {(stream, d) for stream, used, sizes in drawn for d, size in enumerate(sizes) if used and size}


@pytest.mark.parametrize("size", [1, 2, 3, 5, 63, 64, 65])
def test_batches_of_one_dataset_have_no_gaps(size: int) -> None:
    batches = [DataOrder.single(size, 7, 0).global_batch(step) for step in range(3 * size)]
    seen = np.concatenate([batch.epochs * size + batch.rows for batch in batches])
    assert sorted(seen.tolist()) == list(range(21 * size))


def test_an_epoch_of_several_datasets_in_one_bucket_holds_everything_once() -> None:
    sizes = (100, 31, 2)
    order = DataOrder([BucketStream(WIDE, sizes)], sum(sizes), 0)
    for epoch in range(5):
        seen = samples(order.global_batch(epoch))
        assert sorted(seen) == [(0, dataset, epoch, row) for dataset, size in enumerate(sizes) for row in range(size)]


def test_batches_larger_than_the_data_run_over_several_epochs() -> None:
    batch = DataOrder.single(size=3, batch_global=8, seed=1).global_batch(0)
    assert batch.epochs.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    order = DataOrder([BucketStream(WIDE, (1, 2)), BucketStream(TALL, (1, 0))], 64, 0)
    counts: Counter[tuple[int, int]] = Counter()
    for step in range(60):
        counts.update(sample[:2] for sample in samples(order.global_batch(step)))
    assert counts[0, 0] + counts[0, 1] + counts[1, 0] == 60 * 64
    assert max(counts[0, 0], counts[1, 0]) - min(counts[0, 0], counts[1, 0]) <= 64
    assert abs(counts[0, 1] - 2 * counts[0, 0]) <= 4


def test_one_dataset_in_one_bucket_keeps_the_order_that_earlier_runs_had() -> None:
    for (size, batch_global, seed), step, epochs, rows in (
        ((10, 4, 0), 0, [0, 0, 0, 0], [5, 2, 6, 0]),
        ((10, 4, 0), 2, [0, 0, 1, 1], [1, 9, 1, 5]),
        ((1000, 8, 1234), 7, [0] * 8, [270, 726, 189, 950, 748, 408, 412, 190]),
        ((3, 8, 1), 5, [13, 13, 14, 14, 14, 15, 15, 15], [1, 0, 0, 1, 2, 2, 1, 0]),
        ((10**12, 4, 7), 10**8, [0] * 4, [518784849823, 547886648294, 975278503191, 738004720404]),
        ((1_000_003, 6, 2**63 - 1), 300_000, [1] * 6, [960275, 570506, 684106, 36254, 746726, 929954]),
        ((2, 5, 9), 2, [5, 5, 6, 6, 7], [0, 1, 0, 1, 0]),
    ):
        batch = DataOrder.single(size, batch_global, seed).global_batch(step)
        assert (batch.epochs.tolist(), batch.rows.tolist()) == (epochs, rows)


def test_the_order_of_a_mixture_stays_as_it_is() -> None:
    order = mixed(8, weights=(0.2, 0.7, 0.1), images=0.25)
    assert [stream_of(order, step) for step in range(16)] == [3, 0, 0, 2, 0, 0, 1, 1, 3, 1, 0, 1, 0, 2, 3, 3]
    batch = order.global_batch(10**6)
    assert batch.stream == 0
    assert batch.datasets.tolist() == [1, 1, 1, 1, 1, 0, 0, 0]
    assert batch.epochs.tolist() == [87499, 87499, 87499, 87499, 87499, 8571, 8571, 8571]
    assert batch.rows.tolist() == [29, 30, 1, 17, 22, 47, 58, 87]


def test_seed_and_epoch_change_the_order() -> None:
    rows = [
        tuple(DataOrder.single(1000, 1000, seed).global_batch(epoch).rows.tolist())
        for seed in (0, 1, 2**63 - 1)
        for epoch in (0, 1)
    ]
    assert len(set(rows)) == 6
    streams = [tuple(stream_of(mixed(seed=seed), step) for step in range(200)) for seed in range(3)]
    assert len(set(streams)) == 3


def test_lines_of_one_size_do_not_come_in_the_same_order() -> None:
    order = DataOrder([BucketStream(WIDE, (100, 100)), BucketStream(TALL, (100, 100))], 10, 0)
    lines = lines_of(order, 120)
    orders = {tuple(row for epoch, row in seen if epoch < 2) for seen in lines.values()}
    assert len(lines) == len(orders) == 4


def test_rows_of_an_often_drawn_dataset_do_not_come_again_before_the_others() -> None:
    order = DataOrder([BucketStream(WIDE, (100_000, 50))], 100, 0, weights=[1.0, 1.0])
    seen = lines_of(order, 40)[0, 1]
    assert len(seen) >= 1900
    assert [epoch for epoch, _ in seen] == sorted(epoch for epoch, _ in seen)
    assert {len({row for e, row in seen if e == epoch}) for epoch in range(len(seen) // 50)} == {50}


def test_a_million_samples_are_planned_in_under_a_second() -> None:
    started = time.process_time()
    rows = DataOrder.single(1_000_000, 1_000_000, 0).global_batch(0).rows
    assert time.process_time() - started < 1.0
    assert len(np.unique(rows)) == 1_000_000


def test_a_walk_and_a_far_step_hold_a_batch_and_no_table() -> None:
    streams = [
        BucketStream(Bucket(64, 64, frames), (10**12 + frames, 10**10, 10**6 // frames))
        for frames in (1, 9, 17, 33, 65, 129)
    ]
    tracemalloc.start()
    order = DataOrder(streams, 1024, 0, weights=(0.6, 0.3, 0.1), image_fraction=0.1)
    for step in (*range(100), 10**11, 10**12):
        order.global_batch(step)
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


def test_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"batch_global 12 over .* is 6 .* not a multiple of 4 ranks"):
        DataOrder.single(100, 12, 0).micro_batch(0, 0, accumulation=2, rank=0, world_size=4)


def test_cursor_inside_a_batch_is_refused() -> None:
    order = DataOrder.single(100, 12, 0)
    assert order.step_of(24) == 2
    with pytest.raises(ConfigError, match=r"not a multiple of train\.batch_global"):
        order.step_of(25)


def test_data_and_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match="no samples"):
        DataOrder.single(0, 1, 0)
    with pytest.raises(ConfigError, match="2 weights for 3 datasets"):
        mixed(weights=(1.0, 2.0))


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


@pytest.fixture
def rows_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that only count datasets: which rows they give takes most of the time."""
    monkeypatch.setattr(module, "permute", lambda places, *_: places)


@pytest.mark.usefixtures("rows_left_out")
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.2, 0.7, 0.1), (5.0, 1 / 3, 1e-3)])
@pytest.mark.parametrize("images", [0.0, 0.4, 1.0])
def test_shares_of_datasets_follow_their_weights(weights: tuple[float, ...], images: float) -> None:
    order = DataOrder(STREAMS, 20, 5, weights, images)
    counts: Counter[int] = Counter()
    for step in range(500):
        counts.update(order.global_batch(step).datasets.tolist())
    for dataset, weight in enumerate(weights):
        wanted = 500 * 20 * weight / sum(weights)
        assert abs(counts[dataset] - wanted) <= 5 * 20  # one batch a stream, and one over


def test_without_weights_every_sample_is_seen_equally_often() -> None:
    order = DataOrder(STREAMS, 10, 5)
    counts: Counter[tuple[int, ...]] = Counter()
    for step in range(1940):
        batch = order.global_batch(step)
        counts.update(
            (batch.stream, *sample) for sample in zip(batch.datasets.tolist(), batch.rows.tolist(), strict=True)
        )
    assert len(counts) == 194  # every video and no image
    assert set(counts.values()) == {100}


@pytest.mark.parametrize(("fraction", "expected"), [(0.0, 0), (0.1, 108), (0.25, 270), (1 / 3, 360), (1.0, 1080)])
def test_image_batches_come_in_the_ratio_and_evenly(fraction: float, expected: int) -> None:
    order = DataOrder(
        [BucketStream(WIDE, (70,)), BucketStream(TALL, (20,)), BucketStream(IMAGE, (40,))],
        5,
        0,
        image_fraction=fraction,
    )
    kinds = [order.global_batch(step).bucket.is_image for step in range(1080)]  # whole epochs, whatever the fraction
    assert sum(kinds) == expected
    ninths = [sum(kinds[start : start + 120]) for start in range(0, 1080, 120)]
    assert max(ninths) - min(ninths) <= 6


def test_the_share_of_each_bucket_is_as_told() -> None:
    order = DataOrder(STREAMS, 16, 5, (0.2, 0.7, 0.1), 0.3)
    counts = Counter(stream_of(order, step) for step in range(4000))
    shares = order.expected()
    assert sum(share.steps for share in shares) == pytest.approx(1)
    assert shares[3].steps == pytest.approx(0.3)
    for stream, share in enumerate(shares):
        assert abs(counts[stream] - 4000 * share.steps) <= 4


def test_a_bucket_smaller_than_a_batch_comes_rarely_but_is_not_lost() -> None:
    order = DataOrder([BucketStream(WIDE, (1000,)), BucketStream(TALL, (3,))], 100, 0)
    counts = Counter(stream_of(order, step) for step in range(10_030))
    assert counts[1] == 30
    rare = next(step for step in count() if stream_of(order, step) == 1)
    assert Counter(order.global_batch(rare).epochs.tolist()) == {**dict.fromkeys(range(33), 3), 33: 1}


@pytest.mark.parametrize("size", [2, 3, 10, 64, 65])
def test_stand_ins_are_all_the_other_rows_in_turn(size: int) -> None:
    order = DataOrder([BucketStream(WIDE, (5, size))], 4, 0)
    for row in range(0, size, 7):
        first, second = (
            [order.replacement(0, 1, 3, row, attempt) for attempt in range(start, start + size - 1)]
            for start in (0, size - 1)
        )
        assert sorted(first) == sorted(second) == [other for other in range(size) if other != row]


def test_a_line_of_one_row_has_no_stand_in() -> None:
    order = DataOrder([BucketStream(WIDE, (5, 1))], 4, 0)
    assert {order.replacement(0, 1, 3, 0, attempt) for attempt in range(5)} == {0}


def test_stand_ins_depend_on_seed_line_epoch_row_and_attempt_alone() -> None:
    streams = [BucketStream(WIDE, (10**9, 10**9)), BucketStream(TALL, (10**9, 10**9))]
    one, other = DataOrder(streams, 4, 0), DataOrder(streams, 4, 1)
    places = [
        (s, d, epoch, row, attempt)
        for s in (0, 1)
        for d in (0, 1)
        for epoch in (0, 7)
        for row in (0, 5)
        for attempt in (0, 1)
    ]
    rows = [order.replacement(*place) - place[3] for order in (one, other) for place in places]
    assert len(set(rows)) == len(rows)
    again = DataOrder(streams, 64, 0, weights=(1.0, 3.0))
    assert [again.replacement(*place) for place in places] == [one.replacement(*place) for place in places]


def test_stand_ins_of_many_bad_samples_are_spread() -> None:
    order = DataOrder.single(1000, 4, 0)
    counts = Counter(order.replacement(0, 0, 0, row, 0) for row in range(1000))
    assert max(counts.values()) < 10  # 1000 draws out of 1000: 7 or more of one are already rare


def drawn(
    streams: list[BucketStream], weights: Sequence[float] | None, image_fraction: float
) -> Sequence[Sequence[Fraction | int]]:
    """The quotas, as numbers that whole ones may be compared with."""
    return quotas(streams, weights, image_fraction)


def test_without_weights_every_video_counts_once_and_images_are_left_out() -> None:
    streams = [BucketStream(WIDE, (10, 3)), BucketStream(IMAGE, (13, 3)), BucketStream(TALL, (0, 4))]
    assert drawn(streams, None, 0.0) == ((10, 3), (0, 0), (0, 4))


def test_images_are_their_share_of_all_samples_spread_by_size() -> None:
    streams = [BucketStream(WIDE, (10, 5)), BucketStream(IMAGE, (20, 10)), BucketStream(Bucket(32, 32, 1), (0, 20))]
    assert drawn(streams, None, 0.25) == ((10, 5), (2, 1), (0, 2))


def test_images_alone() -> None:
    streams = [BucketStream(WIDE, (10, 5)), BucketStream(IMAGE, (20, 10))]
    assert drawn(streams, None, 1.0) == ((0, 0), (20, 10))


def test_weights_set_the_share_of_each_dataset_and_sizes_that_of_its_buckets() -> None:
    streams = [BucketStream(WIDE, (10, 1)), BucketStream(TALL, (30, 1)), BucketStream(IMAGE, (5, 2))]
    amounts = drawn(streams, [3.0, 1.0], 0.0)
    assert amounts == (
        (Fraction(42 * 3, 4) / 4, Fraction(42, 8)),
        (Fraction(42 * 3, 4) * 3 / 4, Fraction(42, 8)),
        (0, 0),
    )
    assert drawn(streams, [0.75, 0.25], 0.0) == amounts
    videos_and_images = drawn(streams, [3.0, 1.0], 0.5)
    assert videos_and_images[2] == (Fraction(42 * 3, 4), Fraction(42, 4))


def test_a_dataset_of_images_alone_takes_its_share_among_the_images() -> None:
    streams = [BucketStream(WIDE, (10, 0)), BucketStream(IMAGE, (5, 5))]
    assert drawn(streams, [1.0, 1.0], 0.5) == ((10, 0), (5, 5))


def test_decimal_shares_are_exact() -> None:
    for share, wanted in ((0.1, Fraction(1, 10)), (1 / 3, Fraction(1, 3)), (1e-12, Fraction(1e-12))):
        videos, images = (
            sum(row) for row in quotas([BucketStream(WIDE, (90,)), BucketStream(IMAGE, (90,))], None, share)
        )
        assert images / (videos + images) == wanted
    assert drawn([BucketStream(WIDE, (1, 1))], [1e-15, 1.0], 0.0)[0][0] > 0


def test_what_to_expect_is_told() -> None:
    streams = [BucketStream(WIDE, (30, 0)), BucketStream(TALL, (20, 10)), BucketStream(IMAGE, (4, 1))]
    shares = expected(streams, quotas(streams, None, 0.25))
    assert [share.bucket for share in shares] == [WIDE, TALL, IMAGE]
    assert [share.samples for share in shares] == [30, 30, 5]
    assert [share.samples_per_epoch for share in shares] == [30, 30, 20]
    assert [share.steps for share in shares] == [0.375, 0.375, 0.25]
    assert shares[0].datasets == (1.0, 0.0)
    assert shares[2].datasets == (0.8, 0.2)


def test_a_bucket_that_never_comes_is_told_as_such() -> None:
    streams = [BucketStream(WIDE, (30,)), BucketStream(IMAGE, (30,))]
    assert expected(streams, quotas(streams, None, 0.0))[1] == (IMAGE, 30, 0.0, 0.0, (0.0,))


@pytest.mark.parametrize("streams", [[], [BucketStream(WIDE, (0, 0)), BucketStream(IMAGE, (0, 0))]])
def test_no_samples_are_refused(streams: list[BucketStream]) -> None:
    with pytest.raises(DataError, match=r"no samples; build it again"):
        quotas(streams, None, 0.0)


@pytest.mark.parametrize(
    ("weights", "problem"),
    [
        ([1.0], "1 weights for 2 datasets; give each"),
        ([1.0, 0.0], r"weight of dataset 1 of the mixture is 0\.0; set it above 0"),
        ([-1.0, 1.0], r"dataset 0 of the mixture is -1\.0"),
        ([float("nan"), 1.0], "dataset 0 of the mixture is nan"),
        ([1.0, float("inf")], "dataset 1 of the mixture is inf"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights: list[float], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        quotas([BucketStream(WIDE, (10, 5))], weights, 0.0)


def test_a_weight_for_a_dataset_that_is_never_drawn_from_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"dataset 1 of the mixture has the weight 2\.0, but no samples .* leave it out"
    ):
        quotas([BucketStream(WIDE, (10, 0)), BucketStream(IMAGE, (10, 5))], [1.0, 2.0], 0.0)


@pytest.mark.parametrize(
    ("sizes", "fraction", "problem"),
    [
        ((10, 0), 0.1, r"image_fraction is 0\.1, but no bucket of one frame has samples; set it to 0"),
        ((0, 10), 0.5, r"image_fraction is 0\.5, but none of the 10 samples has enough frames .*; set it to 1"),
        ((0, 10), 0.0, r"none of the 10 samples has enough frames"),
        ((10, 10), 1.5, r"image_fraction is 1\.5; set it to .* from 0 to 1"),
        ((10, 10), float("nan"), r"image_fraction is nan"),
    ],
)
def test_a_share_of_images_that_does_not_fit_is_refused(sizes: tuple[int, int], fraction: float, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        quotas([BucketStream(WIDE, sizes[:1]), BucketStream(IMAGE, sizes[1:])], None, fraction)
