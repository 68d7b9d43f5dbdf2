"""The video stream that ffmpeg would choose."""

from __future__ import annotations

from pathlib import Path

import pytest

from regen_dist.data.video.reader import VideoReader
from regen_dist.errors import DataError
from tests.helpers.ffmpeg import H264, PATTERN, ffmpeg

SMALL = ("-f", "lavfi", "-i", "testsrc2=size=64x48:rate=24:duration=1")


def sides(path: Path) -> tuple[int, int, int]:
    with VideoReader(path) as reader:
        info = reader.info()
    return info.frames, info.height, info.width


def test_an_attached_picture_is_never_the_video(tmp_path: Path) -> None:
    cover, path = tmp_path / "cover.png", tmp_path / "a.mp4"
    ffmpeg("-f", "lavfi", "-i", "testsrc2=size=1280x720", "-frames:v", "1", cover)
    maps = ("-map", "1:v", "-map", "0:v", "-disposition:v:0", "attached_pic", "-disposition:v:1", "default")
    ffmpeg(*PATTERN, "-i", cover, *maps, "-c:v:0", "png", "-c:v:1", *H264[1:2], "-pix_fmt:v:1", "yuv420p", path)
    assert sides(path) == (60, 128, 192)


def test_a_file_of_cover_art_alone_says_so(tmp_path: Path) -> None:
    cover, path = tmp_path / "cover.png", tmp_path / "a.mp4"
    ffmpeg("-f", "lavfi", "-i", "testsrc2=size=128x72", "-frames:v", "1", cover)
    sound = ("-f", "lavfi", "-i", "sine=duration=1")
    maps = ("-map", "0:a", "-map", "1:v", "-disposition:v:0", "attached_pic")
    ffmpeg(*sound, "-i", cover, *maps, "-c:v", "png", path)
    with pytest.raises(DataError, match="cover art"):
        VideoReader(path)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_the_default_track_goes_before_a_larger_one(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    maps = ("-map", "0:v", "-map", "1:v", "-disposition:v:0", "0", "-disposition:v:1", "default")
    ffmpeg(*PATTERN, *SMALL, *maps, *H264, path)
    assert sides(path) == (24, 48, 64)


def test_without_marks_the_largest_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    maps = ("-map", "1:v", "-map", "0:v", "-disposition:v:0", "0", "-disposition:v:1", "0")
    ffmpeg(*PATTERN, *SMALL, *maps, *H264, "-default_mode", "passthrough", path)
    assert sides(path) == (60, 128, 192)
