"""How often each dataset comes in each bucket: exact quotas from sizes, weights and the share of images."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import isfinite
from operator import add
from typing import NamedTuple

from regen_dist.errors import ConfigError, DataError

Quotas = tuple[tuple[Fraction, ...], ...]  # [streams][datasets]


class Bucket(NamedTuple):
    """The shape that all clips of a global batch share, in pixels and frames; one frame makes it an image."""

    height: int
    width: int
    frames: int

    @property
    def is_image(self) -> bool:
        return self.frames == 1


class BucketStream(NamedTuple):
    """A bucket, and how many samples each dataset has for it: its lines, which may be empty."""

    bucket: Bucket
    sizes: tuple[int, ...]


class BucketShare(NamedTuple):
    """What to expect of one bucket.

    An epoch is as many video samples as there are videos (with images alone: as there are images). A bucket whose
    `samples_per_epoch` is far above its `samples` repeats them that much more often than others are seen.
    """

    bucket: Bucket
    samples: int
    samples_per_epoch: float
    steps: float  # share of the steps, in [0, 1]
    datasets: tuple[float, ...]  # share of each dataset inside the bucket


def quotas(streams: Sequence[BucketStream], weights: Sequence[float] | None, image_fraction: float) -> Quotas:
    """Samples of each dataset in each stream in one epoch (see `Share`).

    Without weights every video comes once. With weights dataset d gets its share of the videos, among the datasets that
    have any, spread over its buckets by their sizes. `image_fraction` of all samples are images, spread alike.

    Raises:
        ConfigError: weights or image_fraction do not fit the data.
        DataError: there are no samples.
    """
    videos, images = _sizes(streams, images=False), _sizes(streams, images=True)
    num_videos, num_images = _total(videos), _total(images)
    _check_fraction(num_videos, num_images, image_fraction)
    fraction = _exact(image_fraction)
    video_target = Fraction(num_videos if fraction < 1 else 0)
    image_target = num_videos * fraction / (1 - fraction) if fraction < 1 else Fraction(num_images)
    used = [*(videos if video_target else []), *(images if image_target else [])]
    exact = None if weights is None else _exact_weights(weights, [sum(sizes) for sizes in zip(*used, strict=True)])
    spread = zip(_spread(videos, exact, video_target), _spread(images, exact, image_target), strict=True)
    return tuple(tuple(map(add, *rows)) for rows in spread)


def expected(streams: Sequence[BucketStream], amounts: Quotas) -> tuple[BucketShare, ...]:
    """What each stream will have in the long run, from its `quotas`."""
    totals = [sum(row, Fraction()) for row in amounts]
    return tuple(
        BucketShare(
            stream.bucket,
            sum(stream.sizes),
            float(total),
            float(total / sum(totals)),
            tuple(float(quota / total) if total else 0.0 for quota in row),
        )
        for stream, row, total in zip(streams, amounts, totals, strict=True)
    )


def _sizes(streams: Sequence[BucketStream], *, images: bool) -> list[tuple[int, ...]]:
    """Sizes of the lines of one kind, [streams][datasets]; 0 where a stream is of the other kind."""
    return [tuple(size if stream.bucket.is_image == images else 0 for size in stream.sizes) for stream in streams]


def _total(sizes: Sequence[Sequence[int]]) -> int:
    return sum(map(sum, sizes))


def _spread(sizes: Sequence[Sequence[int]], weights: Sequence[Fraction] | None, target: Fraction) -> Quotas:
    """`target` samples over the datasets by weight, and over the lines of each dataset by size."""
    totals = [sum(column) for column in zip(*sizes, strict=True)]
    parts = [Fraction(total) if weights is None else weights[d] * (total > 0) for d, total in enumerate(totals)]
    whole = sum(parts)
    return tuple(
        tuple(target * part / whole * Fraction(size, total) if size else Fraction() for size, part, total in columns)
        for columns in (zip(row, parts, totals, strict=True) for row in sizes)
    )


def _exact(value: float) -> Fraction:
    """The fraction of a small denominator that this float stands for, else the float's own value."""
    near = Fraction(value).limit_denominator(10**9)
    return near if float(near) == value else Fraction(value)


def _check_fraction(num_videos: int, num_images: int, image_fraction: float) -> None:
    if not 0 <= image_fraction <= 1:
        raise ConfigError(f"data.image_fraction is {image_fraction}; set it to the share of image batches, from 0 to 1")
    if not num_videos and not num_images:
        raise DataError("the data holds no samples; build it again with videos that are long enough")
    if image_fraction > 0 and not num_images:
        raise ConfigError(
            f"data.image_fraction is {image_fraction}, but no bucket of one frame has samples; set it to 0, "
            "or add images"
        )
    if image_fraction < 1 and not num_videos:
        raise ConfigError(
            f"data.image_fraction is {image_fraction}, but none of the {num_images} samples has enough frames "
            "for a clip; set it to 1, or add longer videos"
        )


def _exact_weights(weights: Sequence[float], sizes: Sequence[int]) -> list[Fraction]:
    """The weights of datasets that have so many samples to draw from, checked."""
    if len(weights) != len(sizes):
        raise ConfigError(f"the mixture has {len(weights)} weights for {len(sizes)} datasets; give each dataset one")
    for number, (weight, size) in enumerate(zip(weights, sizes, strict=True)):
        if not (isfinite(weight) and weight > 0):
            raise ConfigError(
                f"the weight of dataset {number} of the mixture is {weight}; set it above 0, or leave the dataset out"
            )
        if not size:
            raise ConfigError(
                f"dataset {number} of the mixture has the weight {weight}, but no samples for any bucket that is drawn "
                "from; leave it out of the mixture, or change data.buckets, the frames of a clip or data.image_fraction"
            )
    return [_exact(weight) for weight in weights]
