"""Choice of a clip's frames: by number if the video's frame rate is constant, by time if it is not."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from regen_dist.errors import DataError

JITTER = 0.1  # share of the mean interval by which a constant rate's intervals may differ


GAP_INTERVALS, GAP_S = 10, 2.0  # a longer pause between frames than both (in median intervals, in seconds) is a gap


class FrameTable(NamedTuple):
    """A video's frames in order of presentation.

    Attributes:
        pts: their timestamps, strictly increasing.
        keyframes: timestamp of each keyframe, and the timestamp to seek to for it.
        seekable: true if a frame can be found by its timestamp after a seek. Otherwise (containers whose timestamps are
            missing, repeated or made up) it is found by counting what the decoder gives from the beginning.
        resized: frames at which the picture changes its size.
        lost: packets that could not be decoded.
        aspects: width of a pixel over its height, with the frame from which on it counts, if it is known by decoding
            alone; empty: the container's.
        cut: true if the file ends before the end that its container names.
    """

    pts: tuple[int, ...]
    keyframes: tuple[tuple[int, int], ...]
    seekable: bool = True
    resized: tuple[int, ...] = ()
    lost: int = 0
    aspects: tuple[tuple[int, Fraction | None], ...] = ()
    cut: bool = False


def gaps(table: FrameTable, tick_s: float) -> list[int]:
    """Numbers of the frames in front of which a video pauses for so long that it is another take.

    Args:
        table: the video's frames.
        tick_s: seconds of one unit of its timestamps.
    """
    intervals = np.diff(np.asarray(table.pts, dtype=np.float64))
    if not len(intervals):
        return []
    longest = max(GAP_INTERVALS * float(np.median(intervals)), GAP_S / tick_s)
    return [int(place) + 1 for place in np.flatnonzero(intervals > longest)]


def presentation_times(found: Sequence[int | None], step: int) -> tuple[int, ...]:
    """Strictly increasing timestamps of frames in order of presentation.

    Args:
        found: timestamp of each frame in the container; None where it has none.
        step: ticks of a frame at the nominal rate.

    Returns:
        The same numbers, in order, where they are all there and differ. Otherwise frames without one, and those that
        are not later than the one before, follow that one by `step`.
    """
    known = [each for each in found if each is not None]
    if len(known) == len(found) == len(set(known)):
        return tuple(sorted(known))
    times: list[int] = []
    for each in found:
        after = times[-1] + step if times else 0
        times.append(after if each is None or (times and each <= times[-1]) else each)
    return tuple(times)


def has_variable_rate(table: FrameTable) -> bool:
    """Return true if frame numbers and times differ in pace.

    Constant is a video whose timestamps all lie within one tick of an even grid from first to last (an even rate,
    rounded: 23.976 frames/s in a time base of 1/1000), or whose intervals all lie within a tenth of their mean (a
    clock that trembles, or 24 that turns to 25). Everything else is variable: frames left out, screen recordings,
    films of two rates.
    """
    last = len(table.pts) - 1
    pts = np.asarray(table.pts, dtype=np.int64) - table.pts[0]
    off_grid = np.abs(pts * last - np.arange(last + 1) * pts[-1])  # in ticks times `last`: whole numbers, so exact
    return bool(off_grid.max() > last and np.abs(np.diff(pts) * last - pts[-1]).max() > JITTER * pts[-1])


def clip_frames(table: FrameTable, start: int, stride: int, num_frames: int) -> list[int]:
    """Numbers of the frames of a clip: `num_frames` at an even pace of `stride` mean intervals, from frame `start`.

    At a constant rate these are start, start + stride, ...; at a variable one the frames nearest in time (the
    earlier of two), so that motion keeps its pace: a number comes again where a frame is shown for long, and frames
    that pass faster are left out. Where the clip would run past the last frame, it starts as much earlier as
    it must; where the whole video is too short for the stride, the clip is the whole video at an even pace.

    Returns:
        numbers in [0, frames), never decreasing.

    Raises:
        DataError: `start` is no frame of the video, or stride or num_frames is not positive.
    """
    frames = len(table.pts)
    if not 0 <= start < frames or stride < 1 or num_frames < 1:
        raise DataError(
            f"a clip of {num_frames} frames, {stride} apart, from frame {start} was asked for; the video has {frames}"
        )
    times: Sequence[int] = table.pts if has_variable_rate(table) else range(frames)
    length, intervals, steps = times[-1] - times[0], max(frames - 1, 1), stride * (num_frames - 1)
    if steps > intervals:  # too short: `steps` mean intervals become the whole length
        intervals = steps
    first = min(times[start] * intervals, times[-1] * intervals - steps * length)  # in ticks times `intervals`
    return [_nearest(times, first + index * stride * length, intervals) for index in range(num_frames)]


def _nearest(times: Sequence[int], numerator: int, denominator: int) -> int:
    """The place in `times` (increasing) nearest to numerator / denominator."""
    before = max(bisect_right(times, numerator // denominator) - 1, 0)
    if before + 1 == len(times) or 2 * numerator <= (times[before] + times[before + 1]) * denominator:
        return before
    return before + 1
