"""Data order: the samples of a step as a pure function of (seed, step) and the sizes of the data, without IO.

Three levels, each with random access. Each global batch comes from one bucket, in exact shares. Within a bucket the
datasets are interleaved sample by sample, in exact shares. A *stratum*, all samples of one dataset in one bucket, is an
endless sequence of epochs: position j is in epoch j // size, and a keyed permutation of that epoch gives its row. Ranks
and micro-batches take slices of a global batch, so the numbers of ranks and workers do not change what a step sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import isfinite
from operator import add
from typing import NamedTuple

import numpy as np

from regen_dist.config.identity import micro_batch_size
from regen_dist.data.order.permutation import Int64s, Interleave, combine_keys, permute
from regen_dist.errors import ConfigError, DataError

# Constants that make the uses of one seed independent of each other.
_BUCKETS, _DATASETS, _REPLACEMENTS = 0x62756B74, 0x64617461, 0x7374616E


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


class MicroBatch(NamedTuple):
    """Micro-batch of one rank: b samples of one stream, given by its number and bucket.

    `datasets`, `epochs` and `rows` are int64 [b]; rows are counted within their stratum.
    """

    step: int
    bucket: Bucket
    stream: int
    datasets: Int64s
    epochs: Int64s
    rows: Int64s


class DataOrder:
    """Order of the samples of datasets sorted into buckets, divided into global batches.

    Args:
        streams: the buckets, with one stratum for each dataset.
        batch_global: samples of one optimizer step, over all ranks and micro-batches.
        seed: key of the permutations, in [0, 2**63); a different one gives different permutations.
        weights: share of each dataset, relative to the others'; None draws every video equally often.
        image_fraction: share of the global batches that come from buckets of one frame; 0 leaves those out.

    Raises:
        ConfigError: weights or image_fraction do not fit the data.
        DataError: there are no samples.
    """

    def __init__(
        self,
        streams: Sequence[BucketStream],
        batch_global: int,
        seed: int,
        weights: Sequence[float] | None = None,
        image_fraction: float = 0.0,
    ) -> None:
        self.streams, self.batch_global, self.seed = tuple(streams), batch_global, seed
        self._quotas = quotas(self.streams, weights, image_fraction)
        batches = [sum(row, Fraction()) / batch_global for row in self._quotas]
        self._batches = Interleave.of(batches, combine_keys(seed, _BUCKETS))
        self._samples = {
            stream: Interleave.of(row, combine_keys(seed, _DATASETS, stream))
            for stream, row in enumerate(self._quotas)
            if any(row)
        }
        self._sizes = np.array([stream.sizes for stream in self.streams], dtype=np.int64)

    @classmethod
    def single(cls, size: int, batch_global: int, seed: int) -> DataOrder:
        """Create the order of one dataset of `size` samples in one bucket, no matter which."""
        return cls([BucketStream(Bucket(256, 256, 17), (size,))], batch_global, seed)

    def expected(self) -> tuple[BucketShare, ...]:
        return expected(self.streams, self._quotas)

    def step_of(self, cursor: int) -> int:
        """Return the step that starts after `cursor` samples; raise ConfigError if that is inside a global batch."""
        step, rest = divmod(cursor, self.batch_global)
        if rest:
            raise ConfigError(
                f"the cursor ({cursor} samples) is not a multiple of train.batch_global ({self.batch_global}); "
                "resume with the batch_global that the run was started with"
            )
        return step

    def global_batch(self, step: int) -> MicroBatch:
        return self._slice(step, 0, self.batch_global)

    def micro_batch(self, step: int, micro: int, accumulation: int, rank: int, world_size: int) -> MicroBatch:
        """Return the slice of a global batch that `rank` reads as its micro-batch number `micro`."""
        count = micro_batch_size(self.batch_global, accumulation, world_size)
        return self._slice(step, (micro * world_size + rank) * count, count)

    def replacement(self, stream: int, dataset: int, epoch: int, row: int, attempt: int) -> int:
        """Return a replacement for a bad row from the same stratum.

        Attempts 0, 1, … return every other row once, in a separate order for each (seed, stratum, epoch, row), before
        any repeats. A stratum of one row returns that row.
        """
        size = self.streams[stream].sizes[dataset]
        if size == 1:
            return row
        again, place = divmod(attempt, size - 1)
        key = combine_keys(self.seed, _REPLACEMENTS, stream, dataset, epoch, row)
        return (row + 1 + int(permute(np.array([place]), np.array([again]), size - 1, key)[0])) % size

    def _slice(self, step: int, first: int, count: int) -> MicroBatch:
        (stream,), (number,) = (each.tolist() for each in self._batches.at(step, 1))  # of this batch within the stream
        datasets, positions = self._samples[stream].at(number * self.batch_global + first, count)
        sizes = self._sizes[stream, datasets]
        epochs, places = np.divmod(positions, sizes)
        lines = stream * self._sizes.shape[1] + datasets
        rows = permute(places, epochs, sizes, self.seed, lines)
        return MicroBatch(step, self.streams[stream].bucket, stream, datasets, epochs, rows)


# Random choices of one clip: pure functions of (seed, epoch, sample id), independent of rank, worker and history.

# Constants that make the draws of clips and of rows independent of other uses of the same seed.
_CLIP_STREAM, _ROW_STREAM = 0x636C6970, 0x726F7773


class ClipDraw(NamedTuple):
    """Random choices of one clip: frames `start + i * stride`; crop position as a fraction in [0, 1) of the margin."""

    start: int
    stride: int
    crop_y: float
    crop_x: float
    flip: bool


def draw_clip(
    seed: int, epoch: int, sample_id: int, frames: int, num_frames: int, strides: tuple[int, ...]
) -> ClipDraw:
    """Draw the random choices of one sample in one epoch from a stateless, counter-based generator.

    Args:
        frames: frames of the stored video; `num_frames` of them are taken, `stride` apart.
        strides: allowed strides, one drawn uniformly; if it does not fit, the largest that does.

    Raises:
        DataError: the video has fewer than `num_frames` frames.
    """
    stride_u, start_u, crop_y, crop_x, flip_u = _uniforms(seed, _CLIP_STREAM, epoch, sample_id, 5)
    stride = fit_stride(strides[int(stride_u * len(strides))], strides, frames, num_frames)
    room = frames - stride * (num_frames - 1)
    return ClipDraw(int(start_u * room), stride, crop_y, crop_x, flip_u < 0.5)


def draw_row(seed: int, epoch: int, sample_id: int, clips: int, num_clips: int) -> int:
    """Draw the first clip of a row of `num_clips` clips in a video of `clips` clips, uniformly, like `draw_clip`.

    Raises:
        DataError: the video has fewer than `num_clips` clips.
    """
    if clips < num_clips:
        raise DataError(f"the entry has {clips} clips, a row needs {num_clips}")
    if clips == num_clips:
        return 0
    return int(_uniforms(seed, _ROW_STREAM, epoch, sample_id, 1)[0] * (clips - num_clips + 1))


def fit_stride(wanted: int, strides: tuple[int, ...], frames: int, num_frames: int) -> int:
    """Return `wanted` if it fits, else the largest of `strides` that fits, else the largest possible stride; raise
    DataError if not even 1 fits."""
    if frames < num_frames:
        raise DataError(
            f"the video has {frames} frames, a clip needs {num_frames}; build the shards with "
            f"--min-frames {num_frames}, or train a model of smaller temporal compression"
        )
    if num_frames == 1:
        return wanted
    largest = (frames - 1) // (num_frames - 1)
    return wanted if wanted <= largest else max((stride for stride in strides if stride <= largest), default=largest)


def _uniforms(seed: int, stream: int, epoch: int, sample_id: int, number: int) -> list[float]:
    """Return numbers in [0, 1) that depend on the arguments only."""
    generator = np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, epoch, sample_id]))
    return [float(value) for value in generator.random(number)]


# Mixture quotas: exact shares of each dataset in each bucket, from sizes, weights and the share of images.

Quotas = tuple[tuple[Fraction, ...], ...]  # [streams][datasets]


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
