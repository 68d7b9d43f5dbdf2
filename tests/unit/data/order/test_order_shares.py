from __future__ import annotations

from collections import Counter
from itertools import count

import pytest

from regen_dist.data.order import order as module
from regen_dist.data.order.mixture import Bucket, BucketStream
from regen_dist.data.order.order import DataOrder

WIDE, TALL, LONG, IMAGE = Bucket(64, 96, 9), Bucket(96, 64, 9), Bucket(64, 96, 33), Bucket(64, 64, 1)
STREAMS = [
    BucketStream(WIDE, (100, 31, 2)),
    BucketStream(TALL, (0, 17, 1)),
    BucketStream(LONG, (40, 0, 3)),
    BucketStream(IMAGE, (9, 5, 30)),
]


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
    for step in range(1500):
        counts.update(order.global_batch(step).datasets.tolist())
    for dataset, weight in enumerate(weights):
        wanted = 1500 * 20 * weight / sum(weights)
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
    counts = Counter(order.stream_of(step) for step in range(4000))
    shares = order.expected()
    assert sum(share.steps for share in shares) == pytest.approx(1)
    assert shares[3].steps == pytest.approx(0.3)
    for stream, share in enumerate(shares):
        assert abs(counts[stream] - 4000 * share.steps) <= 4


def test_a_bucket_smaller_than_a_batch_comes_rarely_but_is_not_lost() -> None:
    order = DataOrder([BucketStream(WIDE, (1000,)), BucketStream(TALL, (3,))], 100, 0)
    counts = Counter(order.stream_of(step) for step in range(10_030))
    assert counts[1] == 30
    rare = next(step for step in count() if order.stream_of(step) == 1)
    assert Counter(order.global_batch(rare).epochs.tolist()) == {**dict.fromkeys(range(33), 3), 33: 1}
