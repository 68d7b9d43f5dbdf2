"""The random choices of one clip: pure functions of (seed, epoch, sample id), whatever the rank, worker or history."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from regen_dist.errors import DataError

_CLIP_STREAM = 0x636C6970  # sets the per-clip draws apart from any other use of the same seed


class ClipDraw(NamedTuple):
    """The random choices of one clip: frames `start + i * stride`; crop position in [0, 1) of the room there is."""

    start: int
    stride: int
    crop_y: float
    crop_x: float
    flip: bool


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
            f"the video has {frames} frames, a clip needs {num_frames}; build the shards with "
            f"--min-frames {num_frames}, or train a model of smaller temporal compression"
        )
    if num_frames == 1:
        return wanted
    largest = (frames - 1) // (num_frames - 1)
    return wanted if wanted <= largest else max((stride for stride in strides if stride <= largest), default=largest)
