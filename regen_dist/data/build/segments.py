"""Options of a build, probing of sources, and the segments cut from them: which frames become samples, and why
others do not."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import isfinite
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from regen_dist.data.build.sources import Sources
from regen_dist.data.format.index import SCHEMA_VERSION
from regen_dist.data.format.manifest import Kind
from regen_dist.data.format.writing import ShardLimits
from regen_dist.data.storage.store import Store
from regen_dist.data.video.conversion import LeftOut
from regen_dist.data.video.reader import VideoInfo, VideoReader
from regen_dist.data.video.scenes import CUT, FROZEN, Analysis, Float32s, analyse, is_frozen, missed_cut, motion, shots
from regen_dist.data.video.timing import FrameTable
from regen_dist.data.video.transcode import (
    PRESET,
    X264_PARAMS,
    EncodeOptions,
    Segment,
    content_hash,
    describe_encoding,
    new_hash,
    probe_video,
)
from regen_dist.errors import AccessDenied, BucketMissing, DataError, DiskFull, ObjectDenied, StoreUnavailable
from regen_dist.tables import counted

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

KIND: Kind = "build"
LARGEST_SIDE = 4320  # of a sample, the shorter one: 8K video


@dataclass(frozen=True)
class BuildOptions:
    """Options of `regen shards build`: all that decides about the dataset's bytes beside its sources.

    Times in seconds, sides in pixels. `keep` stores whole files as they are. `scenes` cuts at scene changes and
    measures motion; without it `min_motion` has no say.
    `hdr` ("tone-map" or "leave-out") is of sources of high dynamic range or wide primaries, `interlaced` ("deinterlace"
    or "leave-out") of those with fields. `shard_mb` (10^6 bytes) and `samples_per_shard` close a shard,
    `part_gb` (10^9 bytes of sources) is what is planned and made at a time. None: no limit.
    """

    segment_seconds: float = 4.0
    short_side: int | None = 128
    crf: int = 18
    keep: bool = False
    scenes: bool = True
    scene_threshold: float = CUT
    min_motion: float = FROZEN
    min_frames: int = 33
    min_side: int | None = None
    max_aspect: float | None = None
    hdr: str = "tone-map"
    interlaced: str = "deinterlace"
    start_seconds: float = 0.0
    max_seconds: float | None = None
    shard_mb: float = 256.0
    samples_per_shard: int | None = None
    part_gb: float = 4.0

    def __post_init__(self) -> None:
        names = ("segment_seconds", "samples_per_shard", "min_frames", "scene_threshold", "min_side", "max_seconds")
        values = {name: getattr(self, name) for name in (*names, "shard_mb", "part_gb")}
        given = {name: value for name, value in values.items() if value is not None}
        wrong = [f"{_flag(name)} {value}: must be above 0" for name, value in given.items() if value <= 0]
        numbers = {name: value for name, value in vars(self).items() if isinstance(value, float)}
        wrong += [f"{_flag(name)} {value}: must be finite" for name, value in numbers.items() if not isfinite(value)]
        if self.short_side is not None and self.short_side < 16:
            wrong.append(f"--short-side {self.short_side}: must be at least 16")
        if not 0 <= self.crf <= 51:
            wrong.append(f"--crf {self.crf}: must be 0 (best) to 51")
        if self.max_aspect is not None and self.max_aspect < 1:
            wrong.append(f"--max-aspect {self.max_aspect}: long side over short side, must be at least 1")
        wrong += [f"{_flag(n)} must not be negative" for n in ("start_seconds", "min_motion") if getattr(self, n) < 0]
        if self.short_side is not None and self.short_side > LARGEST_SIDE:
            wrong.append(f"--short-side {self.short_side}: must be at most {LARGEST_SIDE}")
        try:
            _ = self.sources_left_out
        except DataError as error:
            wrong.append(str(error))
        if wrong:
            raise DataError("; ".join(wrong))

    @property
    def sources_left_out(self) -> LeftOut:
        """Return the kinds of sources that are skipped instead of being converted."""
        return LeftOut.of(self.hdr, self.interlaced)

    @property
    def encode(self) -> EncodeOptions:
        return EncodeOptions(self.short_side, self.crf, self.keep)

    @property
    def limits(self) -> ShardLimits:
        return ShardLimits(round(self.shard_mb * 1e6), self.samples_per_shard)

    def recorded(self) -> dict[str, Any]:
        """Return these options and the fixed ones of the encoder, for plan.json and the manifest."""
        encoder = {"codec": "libx264", "preset": PRESET, "x264_params": X264_PARAMS}
        return asdict(self) | ({} if self.keep else encoder)


def build_identity(sources: Sources, options: BuildOptions) -> dict[str, Any]:
    """Return the identity by which a later build recognises its own folder."""
    return {
        "kind": KIND,
        "schema_version": SCHEMA_VERSION,
        "options": options.recorded(),
        "sources": sources.identity(),
    }


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


# Which frames of a source become samples, and which are left out with what reason. Pure: no file is touched.
#
# A reason begins with its kind and a colon ("frozen: …"), by which summaries count.
class Candidate(NamedTuple):
    """Frames [start, stop) of a source: a sample, unless there is a problem. `motion` None: not measured."""

    start: int
    stop: int
    motion: float | None = None
    problem: str = ""


def unsuitable_reason(info: VideoInfo, options: BuildOptions) -> str:
    """Explain why no part of such a source can be used; empty if it can."""
    short, long = sorted((info.height, info.width))
    if options.min_side is not None and short < options.min_side:
        return f"too small: {info.height} x {info.width}, short side below --min-side {options.min_side}"
    if options.max_aspect is not None and long > short * options.max_aspect:
        return f"too narrow: {info.height} x {info.width}, aspect above --max-aspect {options.max_aspect:g}"
    return ""


def candidates(info: VideoInfo, stretches: Sequence[DecodableSpan], options: BuildOptions) -> list[Candidate]:
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


def cut_segments(name: str, content: str, found: Sequence[Candidate]) -> Iterator[Segment | tuple[int, str]]:
    """Decide on each candidate in order: a segment with its key, or its number and the reason for skipping it.

    64 bits of the content's hash are in the key: enough for a hundred million files of one name.
    """
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", PurePosixPath(name).stem)[:48] or "video"
    for number, one in enumerate(found):
        if one.problem:
            yield number, one.problem
        else:
            yield Segment(f"{stem}-{content[:16]}-{one.start:08d}-{one.stop:08d}", number, one.start, one.stop)


def _in_stretch(one: DecodableSpan, first: int, stop: int, fps: float, options: BuildOptions) -> Iterator[Candidate]:
    if one.problem:
        yield Candidate(first, stop, problem=f"damaged: {one.problem}")
        return
    cuts = [one.start + cut for cut in one.analysis.cuts] if one.analysis else []
    length = max(1, round(options.segment_seconds * fps))
    for begin, end in shots(cuts, first, stop):
        for start in range(begin, end, length):
            yield _judged(one, start, min(start + length, end), options)


def _judged(one: DecodableSpan, start: int, stop: int, options: BuildOptions) -> Candidate:
    """The filters that a segment must pass, in order of their cost to the user: the first that fails is reported."""
    if one.analysis is None:
        return Candidate(start, stop, None, _too_short(start, stop, options))
    change, here = one.analysis.change, (start - one.start, stop - one.start)
    problem = _too_short(start, stop, options) or _frozen(change, *here, options)
    if not problem and missed_cut(change, *here, options.scene_threshold):
        problem = "cut inside: too near to another cut, or to the start of the video"
    return Candidate(start, stop, motion(change, *here), problem)


def _kept(info: VideoInfo, stretches: Sequence[DecodableSpan], options: BuildOptions) -> Candidate:
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
    shown = counted(frames, "frame")
    return f"too short: {shown}, below --min-frames {options.min_frames}" if frames < options.min_frames else ""


def _frozen(change: Float32s, start: int, stop: int, options: BuildOptions) -> str:
    if options.min_motion == 0:
        return ""  # not even a single frame, in which nothing can move
    frozen = is_frozen(change, start, stop, options.min_motion)
    return f"frozen: nine of ten changes are below --min-motion {options.min_motion:g}" if frozen else ""


# Looking into sources: what the worker processes of `regen shards build` do before anything is cut. Imports neither
# torch nor pyarrow.


class Origin(NamedTuple):
    """Location of a source: the store's URL, its name there, that of the text beside it; and the local path where it is
    read, to which it is copied first if necessary."""

    folder: str
    file: str
    text: str | None
    path: Path


class DecodableSpan(NamedTuple):
    """Frames [start, stop) of a source that could be decoded, with what was found in them (cuts count from `start`;
    None where cuts were not searched), or the problem."""

    start: int
    stop: int
    analysis: Analysis | None = None
    problem: str = ""


@dataclass(frozen=True)
class SurveyedSource:
    """Survey of a source. Without `info` it cannot be used, and `problem` says why."""

    content: str
    info: VideoInfo | None = None
    stretches: tuple[DecodableSpan, ...] = ()
    caption: str | None = None
    problem: str = ""
    notes: tuple[str, ...] = ()


def fetch_source(origin: Origin) -> Path:
    """Bring a source to its path."""
    if not origin.path.exists() and not origin.folder.startswith("file:"):
        Store(origin.folder).download(origin.file, origin.path)
    return origin.path


def survey_source(origin: Origin, threshold: float | None) -> SurveyedSource:
    """Read through a source: content hash, frames, sides, rate, cuts, motion. Its problems are returned, not raised.

    Args:
        origin: location of the source.
        threshold: threshold of a cut; None: cuts are not searched, so that only the first frame is decoded.
    """
    try:
        path = fetch_source(origin)
    except DataError as error:
        stop_for_the_store(error)
        return SurveyedSource("", problem=f"unreadable: {describe_encoding(error, origin.path)}")
    probed = probe_video(path)
    if probed.info is None:
        return SurveyedSource(probed.content, problem=f"unreadable: {probed.problem}")
    try:
        caption = _caption(origin)
        with VideoReader(origin.path) as reader:
            stretches = tuple(_whole(reader) if threshold is None else _stretches(reader, threshold))
            notes = tuple(dict.fromkeys((*probed.notes, *reader.notes)))
    except (DataError, OSError) as error:
        stop_for_the_store(error)
        return SurveyedSource(probed.content, problem=f"unreadable: {describe_encoding(error, origin.path)}")
    return SurveyedSource(probed.content, probed.info, stretches, caption, notes=notes)


def stop_for_the_store(error: Exception) -> None:
    """Raise an error again that says nothing of the one object that was asked for: whoever asks for the next would get
    the same. A build that leaves these out would leave out everything."""
    one = isinstance(error, ObjectDenied)
    if isinstance(error, AccessDenied | BucketMissing | StoreUnavailable | DiskFull) and not one:
        raise error


def fetch_again(origin: Origin, content: str) -> str:
    """Fetch a source that was surveyed before. Returns why it cannot be fetched any more, or nothing; DataError when
    it has changed since."""
    try:
        fetch_source(origin)
    except DataError as error:
        stop_for_the_store(error)
        return describe_encoding(error, origin.path)
    if content_of(origin, keep=True) != content:
        raise DataError(
            f"{origin.folder}/{origin.file}: has changed since this build began; build into another --out, or bring "
            "the file back"
        )
    return ""


def content_of(origin: Origin, keep: bool) -> str:
    """Content hash of a source; empty when it cannot be read. `keep`: of one in a bucket a copy stays."""
    try:
        if keep:
            fetch_source(origin)
        if origin.path.exists() or origin.folder.startswith("file:"):
            with suppress(OSError):
                return content_hash(origin.path)
            return ""
        digest = new_hash()
        for piece in Store(origin.folder).stream(origin.file):
            digest.update(piece)
        return digest.hexdigest()
    except DataError as error:
        stop_for_the_store(error)
        return ""


def content_to_compare(origin: Origin) -> str:
    """Content hash of a source that may be a copy of another, fetched for good. Empty where it cannot be opened as a
    video: of many error pages that were saved as videos, each is unreadable, and none a duplicate."""
    content = content_of(origin, keep=True)
    with suppress(DataError, OSError), VideoReader(origin.path, FrameTable((), ())):
        return content
    return ""


def _caption(origin: Origin) -> str | None:
    if origin.text is None:
        return None
    try:
        return Store(origin.folder).get(origin.text).decode("utf-8-sig").strip() or None
    except UnicodeDecodeError as error:
        raise DataError(f"its caption {origin.text} is not UTF-8; save it as UTF-8") from error


def _whole(reader: VideoReader) -> Iterator[DecodableSpan]:
    """All frames, cut where the video breaks off and begins anew."""
    edges = [0, *reader.breaks(), len(reader.table.pts)]
    return (DecodableSpan(start, stop) for start, stop in pairwise(edges))


def _stretches(reader: VideoReader, threshold: float) -> Iterator[DecodableSpan]:
    """Analyse a video, cut where it breaks off and begins anew, or changes the size of its picture; where a frame is
    damaged, go on at the next keyframe behind it."""
    start, frames = 0, len(reader.table.pts)
    while start < frames:
        part = _UntilDamage(reader, start)
        analysis = analyse(part, threshold=threshold)
        if part.stop > start:
            yield DecodableSpan(start, part.stop, analysis)
        start = part.stop
        if part.problem:
            start = _next_keyframe(reader, part.stop)
            yield DecodableSpan(part.stop, start, problem=part.problem)


class _UntilDamage:
    """Frames from `start` on; ends before a break, before another size of the picture, and before the first frame that
    cannot be decoded, of which it says why."""

    def __init__(self, reader: VideoReader, start: int) -> None:
        self._reader, self.stop, self.problem = reader, start, ""
        self._end = next((number for number in reader.breaks() if number > start), len(reader.table.pts))

    def __iter__(self) -> Iterator[VideoFrame]:
        sides: tuple[int, int] | None = None
        try:
            for number, frame in self._reader.frames(range(self.stop, self._end)):
                if sides not in (None, (frame.width, frame.height)):
                    return
                sides = frame.width, frame.height
                yield frame
                self.stop = number + 1
        except DataError as error:
            self.problem = str(error)


def _next_keyframe(reader: VideoReader, number: int) -> int:
    """Number of the first keyframe behind a frame; the number of frames when there is none."""
    pts, keyframes = reader.table.pts, [shown for shown, _ in reader.table.keyframes]
    place = bisect_right(keyframes, pts[number])
    return bisect_right(pts, keyframes[place]) - 1 if place < len(keyframes) else len(pts)
