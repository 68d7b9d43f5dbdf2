"""Which sample comes when: pure functions of (seed, epoch, cursor), without IO, tables or walking.

The training stream is an endless line of positions. Position p belongs to epoch p // size, and inside an epoch a keyed
permutation maps its place to a row of the dataset. A global batch is a run of positions; ranks and micro-batches
take slices of it, so neither the number of ranks nor of workers can change which samples a step sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from regen_dist.errors import ConfigError, DataError

Int64s = npt.NDArray[np.int64]
UInt64s = npt.NDArray[np.uint64]

_ROUNDS = 8
_CHUNK = 1 << 15  # elements permuted at once: their temporaries stay in the processor's cache
_SHARE_UNIT = 1 << 30  # image_fraction in whole units, so that counting steps is exact however far the run is
_GOLDEN = 0x9E3779B97F4A7C15
_CLIP_STREAM = 0x636C6970  # sets the per-clip draws apart from any other use of the same seed


class MicroBatch(NamedTuple):
    """What one rank reads at once. `epochs` and `rows` are int64 [b]; `image` says that the clips have one frame."""

    step: int
    epochs: Int64s
    rows: Int64s
    image: bool


class ClipDraw(NamedTuple):
    """The random choices of one clip: frames `start + i * stride`; crop position in [0, 1) of the room there is."""

    start: int
    stride: int
    crop_y: float
    crop_x: float
    flip: bool


@dataclass(frozen=True)
class Order:
    """The order of a dataset of `size` samples, cut into global batches.

    Args:
        size: samples in the dataset.
        batch_global: samples of one optimizer step, over all ranks and micro-batches.
        seed: a different seed gives different permutations.
        image_fraction: share of the global batches whose clips have one frame; spread evenly over the steps.

    Raises:
        DataError: the dataset is empty.
    """

    size: int
    batch_global: int
    seed: int
    image_fraction: float = 0.0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise DataError("the dataset has no samples; build it again with videos that are long enough")

    def step_of(self, cursor: int) -> int:
        """The step that starts after `cursor` samples; ConfigError when that is inside a global batch."""
        step, rest = divmod(cursor, self.batch_global)
        if rest:
            raise ConfigError(
                f"the cursor ({cursor} samples) is not a multiple of train.batch_global ({self.batch_global}); "
                "resume with the batch_global that the run was started with"
            )
        return step

    def global_batch(self, step: int) -> MicroBatch:
        """All samples of a step: positions [step * batch_global, (step + 1) * batch_global) of the stream."""
        return self._positions(step, 0, self.batch_global)

    def micro_batch(self, step: int, micro: int, accumulation: int, rank: int, world_size: int) -> MicroBatch:
        """The slice of a global batch that `rank` reads as its micro-batch number `micro`."""
        count = micro_batch_size(self.batch_global, accumulation, world_size)
        return self._positions(step, (micro * world_size + rank) * count, count)

    def is_image(self, step: int) -> bool:
        """Whether a step trains on single frames: exactly `image_fraction` of any long run of steps, evenly spread."""
        share = ceil(self.image_fraction * _SHARE_UNIT)
        return (step + 1) * share // _SHARE_UNIT > step * share // _SHARE_UNIT

    def _positions(self, step: int, first: int, count: int) -> MicroBatch:
        start = step * self.batch_global + first
        positions = np.arange(start, start + count, dtype=np.int64)
        epochs, places = np.divmod(positions, self.size)
        return MicroBatch(step, epochs, permute(places, epochs, self.size, self.seed), self.is_image(step))


def micro_batch_size(batch_global: int, accumulation: int, world_size: int) -> int:
    """Samples per rank and micro-batch; ConfigError when the global batch does not divide evenly."""
    size, rest = divmod(batch_global, accumulation * world_size)
    if rest or not size:
        raise ConfigError(
            f"train.batch_global {batch_global} is not a multiple of world size {world_size} x "
            f"train.accumulation {accumulation} = {accumulation * world_size}; set it to a multiple, or change the "
            f"number of ranks"
        )
    return size


def permute(places: Int64s, epochs: Int64s, size: int, seed: int) -> Int64s:
    """Rows of the samples at `places` (int64 in [0, size)) of their `epochs`, same shape [n].

    For each (seed, epoch) the map is a permutation of [0, size): a Feistel network over the next power of two,
    walked until it lands inside. Constant time and memory per element, whatever the size.
    """
    rows = np.empty(len(places), dtype=np.int64)
    for start in range(0, len(places), _CHUNK):
        part = slice(start, start + _CHUNK)
        rows[part] = _permute_chunk(places[part], epochs[part], size, seed)
    return rows


def _permute_chunk(places: Int64s, epochs: Int64s, size: int, seed: int) -> Int64s:
    keys = _mix(epochs.astype(np.uint64) + _mix(np.full(1, seed, dtype=np.uint64)))
    values = _feistel(places.astype(np.uint64), keys, size)
    outside = np.flatnonzero(values >= size)
    while len(outside):
        values[outside] = _feistel(values[outside], keys[outside], size)
        outside = outside[values[outside] >= size]
    return values.astype(np.int64)


def _feistel(values: UInt64s, keys: UInt64s, size: int) -> UInt64s:
    """A keyed bijection of [0, 2**bits), the smallest power of two that holds `size` (at least 4)."""
    bits = max(2, (size - 1).bit_length())
    low_bits = np.uint64(bits - bits // 2)
    low_mask, high_mask = np.uint64((1 << (bits - bits // 2)) - 1), np.uint64((1 << (bits // 2)) - 1)
    high, low = values >> low_bits, values & low_mask
    for index in range(_ROUNDS):
        key = keys + np.uint64((index + 1) * _GOLDEN & 0xFFFFFFFFFFFFFFFF)
        if index % 2:
            low = low ^ (_mix(high + key) & low_mask)
        else:
            high = high ^ (_mix(low + key) & high_mask)
    return (high << low_bits) | low


def _mix(values: UInt64s) -> UInt64s:
    """A bijection of 64-bit words in which every input bit reaches every output bit (the finaliser of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def draw_clip(
    seed: int, epoch: int, sample_id: int, frames: int, num_frames: int, strides: tuple[int, ...]
) -> ClipDraw:
    """The random choices for one sample in one epoch, from a counter-based generator: no state, any order.

    Args:
        frames: frames of the stored video; `num_frames` of them are taken, `stride` apart.
        strides: allowed strides, one drawn evenly; where it does not fit, the largest that does.

    Raises:
        DataError: the video has fewer than `num_frames` frames.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, _CLIP_STREAM], counter=[0, 0, epoch, sample_id]))
    stride_u, start_u, crop_y, crop_x, flip_u = (float(value) for value in generator.random(5))
    stride = fit_stride(strides[int(stride_u * len(strides))], strides, frames, num_frames)
    room = frames - stride * (num_frames - 1)
    return ClipDraw(int(start_u * room), stride, crop_y, crop_x, flip_u < 0.5)


def fit_stride(wanted: int, strides: tuple[int, ...], frames: int, num_frames: int) -> int:
    """`wanted` where it fits, else the largest of `strides` that does, else the largest there is; DataError if not
    even 1 fits."""
    if frames < num_frames:
        raise DataError(
            f"the video has {frames} frames, a clip needs {num_frames}; build the shards with --min-frames "
            f"{num_frames}, "
            "or train a model of smaller temporal compression"
        )
    if num_frames == 1:
        return wanted
    largest = (frames - 1) // (num_frames - 1)
    return wanted if wanted <= largest else max((stride for stride in strides if stride <= largest), default=largest)
