"""Which frames are tested on: listed, or found by the rule; and how stretches become clips."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from regen_dist.errors import ConfigError, DataError
from tests.helpers.video import frame_numbers, moving_square, numbered_frames, write_video
from tools.bench.compression_measure import (
    LEAST_FRAMES,
    MOST_FRAMES,
    ClipSpan,
    cut,
    find_clips,
    load_clips,
    read_stretch,
)

LIST = Path(__file__).parents[4] / "configs" / "bench" / "compression_clips.yaml"


def test_the_committed_list_needs_its_videos(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"lacks bikes.mp4, carphone.mp4, .* run `regen fetch-videos`"):
        load_clips(LIST, tmp_path)
    for name in ("bikes.mp4", "carphone.mp4"):
        (tmp_path / name).touch()
    found = load_clips(LIST, tmp_path)
    assert {each.video for each in found.stretches} == {"bikes.mp4", "carphone.mp4"}
    assert all(each.frames >= LEAST_FRAMES for each in found.stretches), "a clip of every k"
    assert len(found.facts()["stretches"]) == len(found.stretches)


def test_an_unknown_key_in_a_list_is_refused(tmp_path: Path) -> None:
    (tmp_path / "clips.yaml").write_text("stretches:\n  - {video: a.mp4, first: 0, frames: 40, crop: 1}\n")
    with pytest.raises(ConfigError, match=r"stretches.0.crop"):
        load_clips(tmp_path / "clips.yaml", tmp_path)


def test_the_rule_takes_the_middle_of_long_shots_and_names_what_it_leaves_out(tmp_path: Path) -> None:
    moving = [moving_square(90, 48, 64, seed=3), moving_square(40, 48, 64, seed=4)[:, ::-1] // 4]
    write_video(tmp_path / "a.mp4", np.concatenate(moving))
    write_video(tmp_path / "sub" / "short.mp4", moving_square(20, 48, 64))
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "notes.txt").write_text("no video either")
    found = find_clips(tmp_path)
    places = [(each.video, each.first, each.frames) for each in found.stretches]
    assert places == [("a.mp4", 12, MOST_FRAMES), ("a.mp4", 90, 40)]
    assert [text.split(":")[0] for text in found.left_out] == ["broken.mp4", "sub/short.mp4"]


def test_a_folder_without_a_test_video_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there are none"):
        find_clips(tmp_path)
    with pytest.raises(DataError, match="is no folder"):
        find_clips(tmp_path / "none")


def test_a_stretch_is_its_frames_at_any_scale(tmp_path: Path) -> None:
    write_video(tmp_path / "numbers.mp4", numbered_frames(60), crf=8)
    stretch = ClipSpan(video="numbers.mp4", first=7, frames=40)
    for side in (48, 96):
        frames = read_stretch(tmp_path, stretch, (side, side * 64 // 48), side)
        assert frames.shape == (40, side, side * 64 // 48, 3)
        assert frame_numbers(frames.transpose(3, 0, 1, 2)) == list(range(7, 47))


def test_a_crop_lies_where_the_list_says(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", numbered_frames(40), crf=8)
    whole = read_stretch(tmp_path, ClipSpan(video="a.mp4", first=0, frames=34), (48, 64), 48)
    for crop_x, left in ((0.0, 0), (0.5, 16), (1.0, 32)):
        part = read_stretch(tmp_path, ClipSpan(video="a.mp4", first=0, frames=34, crop_x=crop_x), (48, 32), 48)
        assert np.array_equal(part, whole[:, :, left : left + 32])


def test_frames_that_are_not_there_are_told_with_the_file(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", numbered_frames(40))
    with pytest.raises(DataError, match=r"a\.mp4: frames 30 to 49 were asked for, the video has 40"):
        read_stretch(tmp_path, ClipSpan(video="a.mp4", first=30, frames=20), (32, 32), 48)


def test_stretches_are_cut_into_whole_clips() -> None:
    frames = np.arange(34)[:, None, None, None]
    assert [len(cut(frames, k + 1)) for k in (4, 8, 16, 32)] == [6, 3, 2, 1]
    assert [clip.ravel().tolist() for clip in cut(frames[:11], 3, stride=2)] == [[0, 2, 4], [5, 7, 9]]
    assert cut(frames[:4], 5) == []
