"""Encoding segments: one pass over several, gaps between them, reasons without paths."""

from __future__ import annotations

from pathlib import Path

from regen_dist.data.build.segments import Origin, survey_source
from regen_dist.data.video.conversion import fit_geometry
from regen_dist.data.video.reader import VideoReader, read_clip
from regen_dist.data.video.transcode import EncodeOptions, Segment, content_hash, encode_segments
from tests.helpers.video import frame_numbers, moving_square, numbered_frames, write_video


def test_segments_with_gaps_are_what_each_is_alone(tmp_path: Path) -> None:
    path = write_video(tmp_path / "video.mp4", numbered_frames(200), crf=4)
    segments = [Segment("a", 0, 3, 20), Segment("b", 2, 31, 50), Segment("c", 3, 50, 60), Segment("d", 9, 150, 190)]
    options = EncodeOptions(None, 4, keep=False)
    together = encode_segments(path, segments, options)
    assert together == [encode_segments(path, [segment], options)[0] for segment in segments]
    for segment, result in zip(segments, together, strict=True):
        with VideoReader(result.data) as reader:
            clip = read_clip(reader, range(segment.stop - segment.start), fit_geometry(48, 64, (48, 64), None))
        assert frame_numbers(clip) == list(range(segment.start, segment.stop))


def test_reasons_hold_no_path_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"this is no video" * 50)
    for name in ("broken.mp4", "absent.mp4"):
        origin = Origin(tmp_path.as_uri(), name, None, tmp_path / name)
        found = survey_source(origin, 27.0)
        (encoded,) = encode_segments(tmp_path / name, [Segment("a", 0, 0, 10)], EncodeOptions(None, 4, keep=False))
        assert found.problem.startswith("unreadable: ")
        assert encoded.problem
        assert str(tmp_path) not in found.problem + encoded.problem


def test_a_survey_tells_content_sides_and_what_moves(tmp_path: Path) -> None:
    path = write_video(tmp_path / "video.mp4", moving_square(50, 48, 64))
    (tmp_path / "video.txt").write_bytes("﻿ a caption\n".encode())
    found = survey_source(Origin(tmp_path.as_uri(), "video.mp4", "video.txt", path), 27.0)
    assert found.info is not None
    assert (found.info.frames, found.info.height, found.info.width) == (50, 48, 64)
    assert (found.content, found.caption, found.problem) == (content_hash(path), "a caption", "")
    (stretch,) = found.stretches
    assert (stretch.start, stretch.stop, stretch.problem) == (0, 50, "")
    assert stretch.analysis is not None
    assert len(stretch.analysis.change) == 50
    (plain,) = survey_source(Origin(tmp_path.as_uri(), "video.mp4", None, path), None).stretches
    assert plain.analysis is None
