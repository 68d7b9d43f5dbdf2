"""Which frames of a source become samples, and which are left out with what reason. Pure: no file is touched.

A reason begins with its kind and a colon ("frozen: …"), by which summaries count.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

from regen_dist.data.making.plan import BuildOptions
from regen_dist.data.making.probing import Stretch
from regen_dist.data.video.reader import VideoInfo
from regen_dist.data.video.scenes import Float32s, is_frozen, missed_cut, motion, shots
from regen_dist.data.video.transcode import Segment


class Candidate(NamedTuple):
    """Frames [start, stop) of a source: a sample, unless there is a problem. `motion` None: not measured."""

    start: int
    stop: int
    motion: float | None = None
    problem: str = ""


def unsuitable(info: VideoInfo, options: BuildOptions) -> str:
    """Why no part of such a source can be used; empty when it can."""
    short, long = sorted((info.height, info.width))
    if options.min_side is not None and short < options.min_side:
        return f"too small: {info.height} x {info.width}, short side below --min-side {options.min_side}"
    if options.max_aspect is not None and long > short * options.max_aspect:
        return f"too narrow: {info.height} x {info.width}, aspect above --max-aspect {options.max_aspect:g}"
    return ""


def candidates(info: VideoInfo, stretches: Sequence[Stretch], options: BuildOptions) -> list[Candidate]:
    """Cut a source at its shots and these into segments, each judged by the filters. With `keep` it is one piece."""
    if options.keep:
        return [_kept(info, stretches, options)]
    first = min(info.frames, round(options.start_seconds * info.fps))
    stop = info.frames
    if options.max_seconds is not None:
        stop = min(stop, first + round(options.max_seconds * info.fps))
    if first >= stop:
        return [Candidate(0, info.frames, problem=f"out of range: it ends before --start-seconds {first / info.fps:g}")]
    return [
        candidate
        for one in stretches
        if max(one.start, first) < min(one.stop, stop)
        for candidate in _in_stretch(one, max(one.start, first), min(one.stop, stop), info.fps, options)
    ]


def segments(name: str, content: str, found: Sequence[Candidate]) -> Iterator[Segment | tuple[int, str]]:
    """What to make of each candidate in order: a segment with its key, or its number and why it is left out.

    64 bits of the content's hash are in the key: enough for a hundred million files of one name.
    """
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", PurePosixPath(name).stem)[:48] or "video"
    for number, one in enumerate(found):
        if one.problem:
            yield number, one.problem
        else:
            yield Segment(f"{stem}-{content[:16]}-{one.start:08d}-{one.stop:08d}", number, one.start, one.stop)


def _in_stretch(one: Stretch, first: int, stop: int, fps: float, options: BuildOptions) -> Iterator[Candidate]:
    if one.problem:
        yield Candidate(first, stop, problem=f"damaged: {one.problem}")
        return
    cuts = [one.start + cut for cut in one.analysis.cuts] if one.analysis else []
    length = max(1, round(options.segment_seconds * fps))
    for begin, end in shots(cuts, first, stop):
        for start in range(begin, end, length):
            yield _judged(one, start, min(start + length, end), options)


def _judged(one: Stretch, start: int, stop: int, options: BuildOptions) -> Candidate:
    """The filters that a segment must pass, in order of their cost to the user: the first that fails is told."""
    if one.analysis is None:
        return Candidate(start, stop, None, _too_short(start, stop, options))
    change, here = one.analysis.change, (start - one.start, stop - one.start)
    problem = _too_short(start, stop, options) or _frozen(change, *here, options)
    if not problem and missed_cut(change, *here, options.scene_threshold):
        problem = "cut inside: too near to another cut, or to the start of the video"
    return Candidate(start, stop, motion(change, *here), problem)


def _kept(info: VideoInfo, stretches: Sequence[Stretch], options: BuildOptions) -> Candidate:
    """A whole file: it may hold cuts, but no damage."""
    damage = next((f"damaged: {one.problem}" for one in stretches if one.problem), "")
    if not damage and len(stretches) > 1:
        damage = f"several takes: it breaks off in front of frame {stretches[1].start}; without --keep it is cut there"
    analysis = stretches[0].analysis
    if damage or analysis is None:
        return Candidate(0, info.frames, None, damage or _too_short(0, info.frames, options))
    problem = _too_short(0, info.frames, options) or _frozen(analysis.change, 0, info.frames, options)
    return Candidate(0, info.frames, motion(analysis.change, 0, info.frames), problem)


def _too_short(start: int, stop: int, options: BuildOptions) -> str:
    frames = stop - start
    return f"too short: {frames} frames, below --min-frames {options.min_frames}" if frames < options.min_frames else ""


def _frozen(change: Float32s, start: int, stop: int, options: BuildOptions) -> str:
    if options.min_motion == 0:
        return ""  # not even a single frame, in which nothing can move
    frozen = is_frozen(change, start, stop, options.min_motion)
    return f"frozen: nine of ten changes are below --min-motion {options.min_motion:g}" if frozen else ""
