from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from regen_dist.data.video.conversion import Geometry
from regen_dist.data.video.reader import VideoReader, read_clip
from regen_dist.data.video.timing import FrameTable, clip_frames, gaps, has_variable_rate, presentation_times
from regen_dist.errors import DataError
from tests.helpers.video import frame_numbers, numbered_frames, write_video


def table(ticks: object) -> FrameTable:
    return FrameTable(tuple(np.asarray(ticks).astype(int).tolist()), ())


def even(rate: float, base: int, frames: int = 500, offset: int = 0) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.arange(frames) * base / rate + offset


FILM = 24000 / 1001


@pytest.mark.parametrize(
    "ticks",
    [
        np.round(even(FILM, 1000)),  # 41 and 42 ms in turn
        np.floor(even(FILM, 1000)),
        np.ceil(even(29.97, 1000, offset=-400)),
        np.round(even(FILM, 90000, offset=126000)),
        np.round(even(25, 12800)),
        even(24, 24),
        np.round(even(59.94, 100)),  # 1 and 2 ticks
        np.round(even(30, 1000) + np.random.default_rng(0).uniform(-1, 1, 500)),  # a clock that trembles
        np.concatenate([even(24, 48000, 250), even(25, 48000, 250, 250 * 2000)]),
        [0],
        [7, 90],
        [0, 2, 5, 6, 8],  # one tick beside the grid, half an interval
        [0, 11, 22, 33, 42, 51, 60],  # three ticks beside it, a tenth of an interval
    ],
)
def test_rounded_and_trembling_clocks_are_constant(ticks: object) -> None:
    assert not has_variable_rate(table(ticks))
    frames = len(table(ticks).pts)
    if frames == 500:
        assert clip_frames(table(ticks), 100, 3, 17) == list(range(100, 151, 3))
        assert clip_frames(table(ticks), 499, 1, 1) == [499]
        assert clip_frames(table(ticks), 483, 1, 17) == list(range(483, 500))


@pytest.mark.parametrize("ticks", [[0, 2, 6, 7, 8], [0, 111, 222, 333, 422, 511, 600], [0, 10, 20, 30, 70]])
def test_a_little_more_is_variable(ticks: list[int]) -> None:
    assert has_variable_rate(table(ticks))


@pytest.mark.parametrize(
    ("found", "times"),
    [
        ([0, 10, 20], (0, 10, 20)),
        ([10, 30, 20], (10, 20, 30)),  # all there and different: only their order is wrong
        ([None, None, None], (0, 5, 10)),
        ([7, None, 20], (7, 12, 20)),
        ([7, None, 9, 30], (7, 12, 17, 30)),  # 9 is not later than 12
        ([3, 3, 20, 4], (3, 8, 20, 25)),
        ([-9, -9, 0], (-9, -4, 0)),
        ([None, 2], (0, 2)),
    ],
)
def test_frames_without_a_time_of_their_own_follow_by_a_step(found: list[int | None], times: tuple[int, ...]) -> None:
    assert presentation_times(found, 5) == times


def test_a_gap_is_long_in_intervals_and_in_seconds() -> None:
    assert gaps(table([0, 40, 80, 2080, 2120]), 1e-3) == []  # 2 s
    assert gaps(table([0, 40, 80, 2081, 2121]), 1e-3) == [3]
    assert gaps(table([0, 300, 600, 3600, 3900]), 1e-3) == []  # 3 s are ten intervals
    assert gaps(table([0, 300, 600, 3601, 3901, 6902]), 1e-3) == [3, 5]
    assert gaps(table([5]), 1e-3) == []


VARIABLE = {
    "left out": np.delete(even(24, 12288), [50, 51, 52, 200, 201, 300]),
    "two rates": np.concatenate([even(24, 1000, 100), even(12, 1000, 100, 4167)]),
    "coarse": np.concatenate([even(24, 24, 100), even(12, 24, 100, 100)]),
    "screen": np.cumsum(np.random.default_rng(1).integers(1, 400, 300)),
}


@pytest.mark.parametrize("name", VARIABLE)
def test_at_a_variable_rate_frames_are_the_nearest_in_time(name: str) -> None:
    video = table(VARIABLE[name])
    assert has_variable_rate(video)
    pts = np.array(video.pts)
    mean = (pts[-1] - pts[0]) / (len(pts) - 1)
    for start, stride, length in ((0, 1, 17), (40, 1, 17), (90, 2, 17), (5, 3, 9), (60, 1, 1)):
        numbers = clip_frames(video, start, stride, length)
        assert numbers[0] == start
        times = pts[start] + np.arange(length) * stride * mean
        nearest = np.abs(pts[None] - times[:, None]).min(1)
        assert np.allclose(np.abs(pts[numbers] - times), nearest, atol=1e-6)


def test_a_frame_shown_for_long_comes_again_and_fast_ones_are_left_out() -> None:
    video = table([0, 10, 20, 30, 40, 90, 100, 102, 104, 106, 108, 110])  # 10 ticks a frame on average
    assert clip_frames(video, 3, 1, 8) == [3, 4, 4, 4, 5, 5, 5, 6]  # 50, 60 are nearer to 40 than to 90: 65 is between
    assert clip_frames(video, 0, 3, 4) == [0, 3, 4, 5]


@pytest.mark.parametrize("start", [0, 100, 250, 298, 299])
def test_a_clip_never_passes_the_end(start: int) -> None:
    video = table(VARIABLE["screen"])
    for stride, length in ((1, 17), (4, 17), (1, 300), (18, 17), (19, 17), (100, 17), (1, 400)):
        numbers = clip_frames(video, start, stride, length)
        assert len(numbers) == length
        assert numbers == sorted(numbers)
        assert 0 <= numbers[0] <= start
        assert numbers[-1] <= 299
        if stride * (length - 1) >= 299:  # as much as there is
            assert (numbers[0], numbers[-1]) == (0, 299)


def test_past_the_end_a_constant_rate_is_shifted_or_shortened_too() -> None:
    video = table(even(24, 24, 20))
    assert clip_frames(video, 15, 1, 9) == list(range(11, 20))
    assert clip_frames(video, 3, 5, 5) == [0, 5, 9, 14, 19]  # 4.75 frames apart
    assert clip_frames(table([5]), 0, 2, 3) == [0, 0, 0]


@pytest.mark.parametrize(("start", "stride", "length"), [(-1, 1, 1), (20, 1, 1), (0, 0, 3), (0, 1, 0)])
def test_what_makes_no_clip_is_an_error(start: int, stride: int, length: int) -> None:
    with pytest.raises(DataError, match="the video has 20"):
        clip_frames(table(even(24, 24, 20)), start, stride, length)


def test_motion_keeps_its_pace_in_a_real_file(tmp_path: Path) -> None:
    """Bars that count milliseconds / 40, frames at random times: a clip counts evenly."""
    ticks = np.cumsum(np.random.default_rng(2).integers(10, 120, 120))
    frames = numbered_frames(256)[ticks // 40]
    path = write_video(tmp_path / "variable.mp4", frames, crf=2, keyframe_interval=12, ticks=ticks.tolist())
    with VideoReader(path) as reader:
        numbers = clip_frames(reader.table, 30, 2, 17)
        counted = np.array(frame_numbers(read_clip(reader, numbers, Geometry(48, 64, 0, 0, (48, 64)))))
    mean = (ticks[-1] - ticks[0]) / 119
    assert (
        np.abs(counted * 40 - (ticks[30] + np.arange(17) * 2 * mean)).max() < 60 + 40
    )  # half the largest gap, a count
    by_number = ticks[30:63:2]
    assert np.abs(by_number - (ticks[30] + np.arange(17) * 2 * mean)).max() > 150  # what would be without
