"""Which frames become samples: shots, remainders, filters, runs of work, parts. No file is touched."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from regen_dist.data.build.plan import BuildPart, PlannedSource, cut_parts, work_of
from regen_dist.data.build.segments import (
    BuildOptions,
    Candidate,
    DecodableSpan,
    candidates,
    cut_segments,
    unsuitable_reason,
)
from regen_dist.data.build.sources import VideoSource
from regen_dist.data.format.manifest import Skip
from regen_dist.data.video.reader import VideoInfo
from regen_dist.data.video.scenes import Analysis
from regen_dist.data.video.transcode import Segment


def moving(frames: int, cuts: tuple[int, ...] = (), **changes: float) -> Analysis:
    """Changes of 2 everywhere and 50 at the cuts; `f12=0` sets that of frame 12."""
    change = np.full(frames, 2.0, np.float32)
    change[list(cuts)] = 50
    for name, value in changes.items():
        change[int(name[1:])] = value
    return Analysis(cuts, change)


def cut(frames: int, *stretches: DecodableSpan, fps: float = 10.0, **options: Any) -> list[Candidate]:
    defaults: dict[str, Any] = {"segment_seconds": 4.0, "min_frames": 20, "min_motion": 0.1}
    return candidates(VideoInfo(frames, 64, 96, fps), stretches, BuildOptions(**defaults | options))


def places(found: list[Candidate]) -> list[tuple[int, int, str]]:
    return [(one.start, one.stop, one.problem.partition(":")[0]) for one in found]


def test_segments_begin_anew_at_every_cut() -> None:
    found = cut(150, DecodableSpan(0, 150, moving(150, (50, 115))))
    assert places(found) == [
        (0, 40, ""),
        (40, 50, "too short"),
        (50, 90, ""),
        (90, 115, ""),
        (115, 150, ""),
    ]
    assert found[1].problem == "too short: 10 frames, below --min-frames 20"
    assert all(one.motion == 2.0 for one in found)


def test_without_scenes_nothing_is_known_and_nothing_is_cut() -> None:
    assert cut(90, DecodableSpan(0, 90)) == [Candidate(0, 40), Candidate(40, 80), cut(90, DecodableSpan(0, 90))[2]]
    assert places(cut(90, DecodableSpan(0, 90)))[2] == (80, 90, "too short")


def test_frozen_shots_and_missed_cuts_are_left_out() -> None:
    still = moving(120)
    still.change[41:80] = 0.05
    found = cut(120, DecodableSpan(0, 120, still._replace(change=still.change)))
    assert places(found) == [(0, 40, ""), (40, 80, "frozen"), (80, 120, "")]
    assert found[1].problem == "frozen: nine of ten changes are below --min-motion 0.1"
    assert places(cut(120, DecodableSpan(0, 120, still), min_motion=0)) == [(0, 40, ""), (40, 80, ""), (80, 120, "")]
    assert places(cut(80, DecodableSpan(0, 80, moving(80, f45=60)))) == [(0, 40, ""), (40, 80, "cut inside")]
    assert places(cut(80, DecodableSpan(0, 80, moving(80, f40=60)))) == [
        (0, 40, ""),
        (40, 80, ""),
    ]  # between two segments
    assert places(cut(80, DecodableSpan(0, 80, moving(80, f45=60)), scene_threshold=61.0))[1] == (40, 80, "")


def test_damage_is_left_out_and_what_is_behind_it_is_used() -> None:
    found = cut(
        200,
        DecodableSpan(0, 50, moving(50)),
        DecodableSpan(50, 80, problem="frame 50 is damaged"),
        DecodableSpan(80, 200, moving(120, (60,))),
    )
    assert places(found) == [
        (0, 40, ""),
        (40, 50, "too short"),
        (50, 80, "damaged"),
        (80, 120, ""),
        (120, 140, ""),
        (140, 180, ""),
        (180, 200, ""),
    ]


def test_start_and_length_bound_what_is_used() -> None:
    whole = DecodableSpan(0, 200, moving(200, (100,)))
    assert places(cut(200, whole, start_seconds=5.0, max_seconds=9.0)) == [
        (50, 90, ""),
        (90, 100, "too short"),
        (100, 140, ""),
    ]
    assert places(cut(200, whole, start_seconds=20.0)) == [(0, 200, "out of range")]
    assert places(cut(200, DecodableSpan(0, 200), start_seconds=19.0)) == [(190, 200, "too short")]


def test_whole_files_are_one_piece_whatever_they_hold() -> None:
    assert places(cut(200, DecodableSpan(0, 200, moving(200, (100,))), keep=True, start_seconds=3)) == [(0, 200, "")]
    assert cut(200, DecodableSpan(0, 200), keep=True) == [Candidate(0, 200)]
    assert places(cut(10, DecodableSpan(0, 10), keep=True)) == [(0, 10, "too short")]
    still = Analysis((), np.zeros(50, np.float32))
    assert places(cut(50, DecodableSpan(0, 50, still), keep=True)) == [(0, 50, "frozen")]
    broken = (DecodableSpan(0, 50, moving(50)), DecodableSpan(50, 80, problem="frame 50 is damaged"))
    assert places(cut(80, *broken, keep=True)) == [(0, 80, "damaged")]


@pytest.mark.parametrize(
    ("height", "width", "reason"),
    [
        (64, 96, ""),
        (96, 63, "too small: 96 x 63, short side below --min-side 64"),
        (64, 193, "too narrow"),
        (192, 64, ""),
    ],
)
def test_sides_decide_about_whole_sources(height: int, width: int, reason: str) -> None:
    found = unsuitable_reason(VideoInfo(100, height, width, 24.0), BuildOptions(min_side=64, max_aspect=3.0))
    assert found.startswith(reason)
    assert bool(found) == bool(reason)


def test_keys_hold_name_content_and_frames() -> None:
    found = list(
        cut_segments("a b/été.x.mp4", "0123456789abcdef" * 2, [Candidate(0, 40), Candidate(40, 50, 1.0, "no: x")])
    )
    assert found == [Segment("_t_x-0123456789abcdef-00000000-00000040", 0, 0, 40), (1, "no: x")]


def source(name: str, size: int) -> VideoSource:
    return VideoSource(name, "file:///tmp", name, size)


def test_parts_are_consecutive_and_know_no_tasks() -> None:
    sources = [source(f"{number}.mp4", size) for number, size in enumerate([3, 3, 5, 20, 1, 1, 1])]
    parts = cut_parts(sources, 10)
    assert [(part.number, part.first, len(part.sources)) for part in parts] == [(0, 0, 3), (1, 3, 1), (2, 4, 3)]
    assert [one for part in parts for one in part.sources] == sources
    assert cut_parts(sources[:1], 10)[0].stem == "part-00000"


def test_work_goes_on_at_any_unit() -> None:
    long = [Candidate(start, start + 40, 1.0, "short: x" if start % 120 == 80 else "") for start in range(0, 1200, 40)]
    planned = [
        PlannedSource("", problem="unreadable: x"),
        PlannedSource("ab" * 16, VideoInfo(1200, 64, 64, 10.0), tuple(long)),
        PlannedSource("cd" * 16, VideoInfo(2000, 64, 64, 10.0), (Candidate(0, 40), Candidate(1000, 1040))),
    ]
    part = BuildPart(0, 0, tuple(source(f"{number}.mp4", 1) for number in range(3)))
    whole = list(work_of(part, planned))
    assert whole[0] == whole[0]._replace(source=0, units=(Skip(source="0.mp4", reason="unreadable: x"),))
    assert [len(work.segments) for work in whole] == [0, 8, 8, 4, 1, 1]
    units = [unit for work in whole for unit in work.units]
    assert len(units) == 33
    for after in range(34):
        assert [unit for work in work_of(part, planned, after) for unit in work.units] == units[after:]
