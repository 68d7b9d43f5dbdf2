"""The random choices of one clip: pure functions of (seed, epoch, sample id), whatever the rank, worker or history."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from regen_dist.errors import DataError

# Set the draws of clips, and of rows of clips, apart from any other use of the same seed.
_CLIP_STREAM, _ROW_STREAM = 0x636C6970, 0x726F7773


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
    stride_u, start_u, crop_y, crop_x, flip_u = _uniforms(seed, _CLIP_STREAM, epoch, sample_id, 5)
    stride = fit_stride(strides[int(stride_u * len(strides))], strides, frames, num_frames)
    room = frames - stride * (num_frames - 1)
    return ClipDraw(int(start_u * room), stride, crop_y, crop_x, flip_u < 0.5)


def draw_row(seed: int, epoch: int, sample_id: int, clips: int, num_clips: int) -> int:
    """Where a row of `num_clips` clips begins in a video of `clips` clips; each place is as likely. By the same rules
    as `draw_clip`.

    Raises:
        DataError: the video has fewer than `num_clips` clips.
    """
    if clips < num_clips:
        raise DataError(f"the entry has {clips} clips, a row needs {num_clips}")
    if clips == num_clips:
        return 0
    return int(_uniforms(seed, _ROW_STREAM, epoch, sample_id, 1)[0] * (clips - num_clips + 1))


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


def _uniforms(seed: int, stream: int, epoch: int, sample_id: int, number: int) -> list[float]:
    """Numbers in [0, 1) that these alone decide."""
    generator = np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, epoch, sample_id]))
    return [float(value) for value in generator.random(number)]
