"""Mixture quotas: exact shares of each dataset in each bucket, from sizes, weights and the share of images."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import isfinite
from operator import add
from typing import NamedTuple

from regen_dist.errors import ConfigError, DataError

Quotas = tuple[tuple[Fraction, ...], ...]  # [streams][datasets]


class Bucket(NamedTuple):
    """Shape that all clips of a global batch share, in pixels and frames; one frame means an image."""

    height: int
    width: int
    frames: int

    @property
    def is_image(self) -> bool:
        return self.frames == 1


class BucketStream(NamedTuple):
    """Bucket with the number of samples of each dataset in it (its strata, which may be empty)."""

    bucket: Bucket
    sizes: tuple[int, ...]


class BucketShare(NamedTuple):
    """Expected share of one bucket.

    An epoch has as many video samples as there are videos (with images only: as there are images). A bucket whose
    `samples_per_epoch` is far above its `samples` repeats its samples correspondingly often.
    """

    bucket: Bucket
    samples: int
    samples_per_epoch: float
    steps: float  # share of the steps, in [0, 1]
    datasets: tuple[float, ...]  # share of each dataset inside the bucket


def quotas(streams: Sequence[BucketStream], weights: Sequence[float] | None, image_fraction: float) -> Quotas:
    """Return the samples of each dataset in each stream in one epoch (see `BucketShare`).

    Without weights every video occurs once. With weights, dataset d has its share of the videos, among the datasets
    with any, distributed over its buckets by their sizes. `image_fraction` of all samples are images, likewise.

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
    """Return the long-run share of each stream from its `quotas`."""
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
    """Return the sizes of the strata of one kind, [streams][datasets]; 0 where a stream is of the other kind."""
    return [tuple(size if stream.bucket.is_image == images else 0 for size in stream.sizes) for stream in streams]


def _total(sizes: Sequence[Sequence[int]]) -> int:
    return sum(map(sum, sizes))


def _spread(sizes: Sequence[Sequence[int]], weights: Sequence[Fraction] | None, target: Fraction) -> Quotas:
    """Distribute `target` samples over the datasets by weight, and over the strata of each dataset by size."""
    totals = [sum(column) for column in zip(*sizes, strict=True)]
    parts = [Fraction(total) if weights is None else weights[d] * (total > 0) for d, total in enumerate(totals)]
    whole = sum(parts)
    return tuple(
        tuple(target * part / whole * Fraction(size, total) if size else Fraction() for size, part, total in columns)
        for columns in (zip(row, parts, totals, strict=True) for row in sizes)
    )


def _exact(value: float) -> Fraction:
    """Return the fraction with a small denominator that this float approximates, else its exact value."""
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
    """Validate the weights of datasets of these sizes and return them as fractions."""
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
