from __future__ import annotations

import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.frame import VideoFrame

from regen_dist.data.video.conversion import UInt8s
from regen_dist.data.video.reader import VideoReader
from regen_dist.data.video.scenes import analyse, is_frozen, missed_cut, motion, shots
from regen_dist.errors import DataError
from tests.helpers.video import moving_square, write_video


def scene(number: int, num_frames: int) -> UInt8s:
    """A square that moves over another colour for each number: [T, 90, 160, 3]."""
    colour = np.array([[20, 60, 160], [190, 150, 30], [40, 170, 60], [200, 40, 60]])[number % 4]
    frames = moving_square(num_frames, 90, 160, seed=number) * 0.3 + colour * 0.8
    return np.asarray(frames.clip(0, 255), dtype=np.uint8)


def video(folder: Path, *parts: UInt8s, crf: int = 20, keyframe_interval: int = 24) -> bytes:
    path = folder / "video.mp4"
    return write_video(path, np.concatenate(parts), crf=crf, keyframe_interval=keyframe_interval).read_bytes()


def _frames(reader: VideoReader, start: int = 0, stop: int | None = None) -> Iterator[VideoFrame]:
    return (frame for _, frame in reader.frames(range(start, stop or len(reader.table.pts))))


def test_hard_cuts_are_found_to_the_frame(tmp_path: Path) -> None:
    with VideoReader(video(tmp_path, scene(0, 40), scene(1, 57), scene(2, 30))) as reader:
        found = analyse(_frames(reader))
        assert found.cuts == (40, 97)
        assert found.change.shape == (127,)
        assert found.change.dtype == np.float32
        assert found.change[0] == 0
        assert set(np.flatnonzero(found.change >= 27)) == {40, 97}
        part = analyse(_frames(reader, 30, 110))
        assert part.cuts == (67,)  # numbers count from what was given; the cut after 10 frames is too near the start
        assert np.array_equal(part.change[1:], found.change[31:110])
        assert missed_cut(part.change, 0, 67)
        assert analyse(_frames(reader, 30, 110), min_scene_frames=8).cuts == (10, 67)
        assert analyse(_frames(reader), threshold=200).cuts == ()
    assert shots(found.cuts, 0, 127) == [(0, 40), (40, 97), (97, 127)]
    assert not any(
        missed_cut(found.change, *shot) or is_frozen(found.change, *shot) for shot in shots((40, 97), 0, 127)
    )


def test_change_is_the_mean_difference_of_hue_saturation_and_brightness(tmp_path: Path) -> None:
    grey = np.repeat(np.array([60, 60, 60, 90, 90, 80], np.uint8), 90 * 160 * 3).reshape(6, 90, 160, 3)
    with VideoReader(video(tmp_path, grey, crf=1)) as reader:
        assert analyse(_frames(reader)).change == pytest.approx([0, 0, 0, 10, 0, 10 / 3], abs=0.4)


def test_cuts_near_one_another_are_merged_and_told(tmp_path: Path) -> None:
    with VideoReader(video(tmp_path, scene(0, 40), scene(1, 5), scene(2, 60), scene(3, 30))) as reader:
        cuts, change = analyse(_frames(reader))
    assert cuts == (40, 105)
    assert [missed_cut(change, *shot) for shot in shots(cuts, 0, 135)] == [False, True, False]
    assert missed_cut(change, 40, 46)
    assert not missed_cut(change, 45, 105)  # the change into a segment is not inside it


@pytest.mark.parametrize("crf", [18, 30])
def test_a_frozen_shot_is_told_from_one_that_hardly_moves(tmp_path: Path, crf: int) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (9, 16, 3), dtype=np.uint8).repeat(10, 0).repeat(10, 1)
    still = np.repeat(picture[None], 60, 0)
    creeping = np.stack([np.roll(picture, -(index // 3), 1) for index in range(60)])
    with VideoReader(video(tmp_path, still, scene(1, 40), creeping, crf=crf, keyframe_interval=20)) as reader:
        cuts, change = analyse(_frames(reader))
    assert cuts == (60, 100)
    assert [is_frozen(change, *shot) for shot in shots(cuts, 0, 160)] == [True, False, False]
    assert motion(change, 0, 60) < 0.5 < motion(change, 100, 160)
    assert is_frozen(change, 100, 160, level=50)


@pytest.mark.parametrize("seed", range(3))
def test_noise_and_moving_things_are_no_cuts(tmp_path: Path, seed: int) -> None:
    noise = np.random.default_rng(seed).normal(0, 12, (80, 90, 160, 3))
    frames = np.clip(moving_square(80, 90, 160, seed) + noise, 0, 255).astype(np.uint8)
    with VideoReader(video(tmp_path, frames)) as reader:
        cuts, change = analyse(_frames(reader))
    assert cuts == ()
    assert not missed_cut(change, 0, 80)
    assert not is_frozen(change, 0, 80)


def test_shots_and_motion_of_parts() -> None:
    assert shots((10, 20, 30), 10, 30) == [(10, 20), (20, 30)]
    assert shots((10, 20, 30), 12, 14) == [(12, 14)]
    assert shots((), 0, 5) == [(0, 5)]
    assert shots((3,), 5, 5) == []
    change = np.array([0, 1, 2, 50, 4, 6], np.float32)
    assert motion(change, 0, 3) == 1.5
    assert motion(change, 3, 6) == 5  # the cut into it does not count
    assert motion(change, 3, 4) == 0
    assert is_frozen(change, 3, 4)


@pytest.mark.parametrize(("height", "width"), [(720, 64), (64, 720), (16, 16), (1080, 1920)])
def test_any_shape_of_picture(height: int, width: int) -> None:
    frames = [av.VideoFrame(width, height, "yuv420p") for _ in range(40)]
    for index, frame in enumerate(frames):
        for plane, value in zip(frame.planes, (40, 90, 128) if index < 20 else (200, 128, 200), strict=True):
            plane.update(bytes([value]) * plane.buffer_size)
    assert analyse(frames).cuts == (20,)


def test_memory_does_not_grow_with_the_video() -> None:
    frames = [av.VideoFrame.from_ndarray(picture, format="rgb24") for picture in moving_square(10, 45, 80)]
    analyse(frames)
    tracemalloc.start()
    long = analyse(frames[index % 10] for index in range(1000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(long.change) == 1000
    assert peak < 500_000  # 1000 pictures of this size are 11 MB


def test_nothing_and_damage(tmp_path: Path) -> None:
    assert analyse([]).cuts == ()
    assert len(analyse([]).change) == 0
    data = bytearray(video(tmp_path, scene(0, 40)))
    middle = data.index(b"mdat") + 8
    data[middle : middle + 2000] = bytes(2000)
    with VideoReader(data) as reader, pytest.raises(DataError):
        analyse(_frames(reader))


def test_the_detector_is_imported_late_and_keeps_to_one_thread() -> None:
    script = (
        "import sys; from regen_dist.data.video import scenes; assert not {'cv2', 'scenedetect'} & set(sys.modules)\n"
        "scenes.analyse([]); import cv2; assert cv2.getNumThreads() == 1"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
