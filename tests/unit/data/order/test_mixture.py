from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import pytest

from regen_dist.data.order.mixture import Bucket, BucketStream, expected, quotas
from regen_dist.errors import ConfigError, DataError

WIDE, TALL, IMAGE = Bucket(64, 96, 9), Bucket(96, 64, 9), Bucket(64, 64, 1)


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
