"""Looking into sources: what the worker processes of `regen shards build` do before anything is cut. Imports neither
torch nor pyarrow."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from regen_dist.data.storage.store import Store
from regen_dist.data.video.reader import VideoInfo, VideoReader
from regen_dist.data.video.scenes import Analysis, analyse
from regen_dist.data.video.transcode import content_hash, describe_encoding, new_hash, probe_video
from regen_dist.errors import AccessDenied, BucketMissing, DataError, DiskFull, ObjectDenied, StoreUnavailable

if TYPE_CHECKING:
    from av.video.frame import VideoFrame


class Origin(NamedTuple):
    """Location of a source: the store's URL, its name there, that of the text beside it; and the local path where it is
    read, to which it is copied first if necessary."""

    folder: str
    file: str
    text: str | None
    path: Path


class DecodableSpan(NamedTuple):
    """Frames [start, stop) of a source that could be decoded, with what was found in them (cuts count from `start`;
    None where nothing was looked for), or the problem."""

    start: int
    stop: int
    analysis: Analysis | None = None
    problem: str = ""


@dataclass(frozen=True)
class SurveyedSource:
    """A source that was looked into. Without `info` it cannot be used, and `problem` says why."""

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
        threshold: threshold of a cut; None looks for no cuts, so that only the first frame is decoded.
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
    """Bring a source that was looked into before. Returns why it cannot be fetched any more, or nothing; DataError when
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
        return _content_of(origin, keep)
    except DataError as error:
        stop_for_the_store(error)
        return ""


def _content_of(origin: Origin, keep: bool) -> str:
    if keep:
        fetch_source(origin)
    if origin.path.exists() or origin.folder.startswith("file:"):
        try:
            return content_hash(origin.path)
        except OSError:
            return ""
    digest = new_hash()
    for piece in Store(origin.folder).stream(origin.file):
        digest.update(piece)
    return digest.hexdigest()


def _caption(origin: Origin) -> str | None:
    if origin.text is None:
        return None
    try:
        return Store(origin.folder).get(origin.text).decode("utf-8-sig").strip() or None
    except UnicodeDecodeError as error:
        raise DataError(f"its caption {origin.text} is not UTF-8") from error


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
