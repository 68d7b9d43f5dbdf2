"""Cutting and encoding in the worker processes of `regen shards build`. Imports neither torch nor pyarrow."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from regen_dist.data.video.conversion import (
    LIMITED_RANGE,
    RESIZE,
    UPRIGHT,
    Orientation,
    frame_to_rgb,
    has_centred_chroma,
    to_yuv,
)
from regen_dist.data.video.reader import VideoInfo, VideoReader
from regen_dist.data.video.timing import FrameTable
from regen_dist.errors import DataError

if TYPE_CHECKING:
    from av.container import OutputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

KEYFRAME_INTERVAL = 12  # clips are read at random places: decoding one wastes 6 frames on average
PRESET = "fast"
# Without cpu-independent, the same input gave other bytes from call to call (x264 core 165, AVX-512, measured).
X264_PARAMS = f"keyint={KEYFRAME_INTERVAL}:scenecut=0:cpu-independent=1"


@dataclass(frozen=True)
class Segment:
    """Frames [start, stop) of a source, which become the sample `key`. `number` counts the segments of the source."""

    key: str
    number: int
    start: int
    stop: int


@dataclass(frozen=True)
class EncodeOptions:
    """Storage of a segment: short side in pixels (None keeps the sides), x264's constant rate factor, or the
    file as it is."""

    short_side: int | None
    crf: int
    keep: bool


@dataclass(frozen=True)
class StreamTags:
    """Tags of a stream's frames: frames per second, the unit of their timestamps in seconds, colours (numbers
    of H.273)."""

    rate: Fraction
    time_base: Fraction | None
    colorspace: int
    primaries: int
    transfer: int


@dataclass(frozen=True)
class EncodedSegment:
    """A finished segment: the file's bytes and what is in it, or the reason why there is none."""

    segment: Segment
    data: bytes = b""
    info: VideoInfo | None = None
    problem: str = ""


@dataclass(frozen=True)
class Probed:
    """A source file: its content hash, what is in it and how its frames are converted, or the reason why it cannot be
    used."""

    content: str = ""
    info: VideoInfo | None = None
    problem: str = ""
    notes: tuple[str, ...] = ()


def new_hash() -> hashlib.blake2b:
    """Return a new content hash: BLAKE2b of 16 bytes."""
    return hashlib.blake2b(digest_size=16)


def content_hash(path: Path) -> str:
    """Hash of a local file's bytes, in hex; OSError when it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, new_hash).hexdigest()


def probe_video(path: Path) -> Probed:
    """Read through a file: content hash, frames, sides, rate. Problems are returned, not raised."""
    content = ""
    try:
        content = content_hash(path)
        if not path.stat().st_size:
            return Probed(content, problem="it is empty (0 bytes); copy the file again, or leave it out")
        with VideoReader(path) as reader:
            return Probed(content, reader.info(), notes=reader.notes)
    except (DataError, OSError) as error:
        return Probed(content, problem=describe_encoding(error, path))


def describe_encoding(error: Exception, path: Path) -> str:
    """An error without the path of this machine: it is kept with the dataset, which calls the source by its name."""
    return str(error).replace(f": {f'file:{path}'!r}", "").replace(str(path), path.name)


def encode_segments(path: Path, segments: Sequence[Segment], options: EncodeOptions) -> list[EncodedSegment]:
    """Every segment of one source, in order. A segment that cannot be decoded comes back with its problem.

    All are decoded in one pass; where that fails, each is tried by itself, so that damage stays where it is.
    """
    import av

    if options.keep:
        return [_explain(path, segment, lambda _: path.read_bytes()) for segment in segments]
    try:
        return _encode_run(path, segments, options)
    except (DataError, OSError, av.FFmpegError):
        return [_explain(path, segment, lambda one: _encode_run(path, [one], options)[0].data) for segment in segments]


def _explain(path: Path, segment: Segment, make: Callable[[Segment], bytes]) -> EncodedSegment:
    import av

    try:
        return _checked(segment, make(segment))
    except (DataError, OSError, av.FFmpegError) as error:  # FFmpeg's are of sides that no scaler or encoder takes
        return EncodedSegment(segment, problem=describe_encoding(error, path))


def _encode_run(path: Path, segments: Sequence[Segment], options: EncodeOptions) -> list[EncodedSegment]:
    """Transcode segments that are in order, and near enough to one another to be decoded in one pass."""
    numbers = [number for segment in segments for number in range(segment.start, segment.stop)]
    with VideoReader(path, _frame_table(path)) as reader:
        decoded = (frame for _, frame in reader.frames(numbers))
        done = []
        for segment in segments:
            frames = (
                prepare_encoder(frame, options.short_side) for frame in islice(decoded, segment.stop - segment.start)
            )
            data = _encode(frames, reader, first_pts=reader.table.pts[segment.start], crf=options.crf)
            done.append(_checked(segment, data))
    return done


def _checked(segment: Segment, data: bytes) -> EncodedSegment:
    with VideoReader(data) as reader:
        info = reader.info()
    if info.frames != segment.stop - segment.start:
        raise DataError(f"{segment.stop - segment.start} frames went in, {info.frames} came out")
    return EncodedSegment(segment, data, info)


@lru_cache(maxsize=4)
def _frame_table(path: Path) -> FrameTable:
    """A process cuts many segments from one source: read through it once."""
    with VideoReader(path) as reader:
        return reader.table


def _encode(frames: Iterator[VideoFrame], reader: VideoReader, *, first_pts: int, crf: int) -> bytes:
    """A segment with the source's pace, timestamps from zero, tagged with the colours of its frames."""
    first = next(frames)
    colours = first.colorspace, first.color_primaries, first.color_trc
    tags = StreamTags(reader.rate, reader.stream.time_base, *colours)
    return encode_frames(_moved(chain([first], frames), first_pts), tags, crf)


def _moved(frames: Iterator[VideoFrame], first_pts: int) -> Iterator[VideoFrame]:
    for frame in frames:
        frame.pts = (frame.pts or 0) - first_pts
        yield frame


def encode_frames(frames: Iterable[VideoFrame], tags: StreamTags, crf: int) -> bytes:
    """H.264 in mp4 of yuv420p frames of limited range with even sides, `pts` set. Equal input gives equal bytes."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream: VideoStream | None = None
        for frame in frames:
            stream = stream or _add_stream(output, frame, tags, crf)
            output.mux(stream.encode(frame))
        if stream is not None:
            output.mux(stream.encode(None))
    return buffer.getvalue()


def _add_stream(output: OutputContainer, frame: VideoFrame, tags: StreamTags, crf: int) -> VideoStream:
    # One thread and no other changing input: the same source and options give the same bytes.
    # Untagged, H.264 means chroma at the left edge of its pixels.
    params = f"{X264_PARAMS}:chromaloc=1" if has_centred_chroma(frame) else X264_PARAMS
    options = {"crf": str(crf), "preset": PRESET, "threads": "1", "x264-params": params}
    stream = output.add_stream("libx264", rate=tags.rate, options=options)
    stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, "yuv420p"
    context = stream.codec_context
    if tags.time_base is not None:
        context.time_base = tags.time_base
    context.color_range = LIMITED_RANGE
    context.colorspace, context.color_primaries, context.color_trc = tags.colorspace, tags.primaries, tags.transfer
    return stream


def prepare_encoder(frame: VideoFrame, short_side: int | None) -> VideoFrame:
    """The frame upright, resized to `short_side`, with even sides, as yuv420p of limited range."""
    from av.video.frame import PictureType, VideoFrame

    scale = short_side / min(frame.height, frame.width) if short_side else 1.0
    height, width = (max(2, round(side * scale / 2) * 2) for side in (frame.height, frame.width))
    pts, time_base = frame.pts, frame.time_base
    orientation = Orientation.of(frame)
    if orientation != UPRIGHT:
        image = frame_to_rgb(frame, *((width, height) if orientation.turned else (height, width)))
        upright = VideoFrame.from_ndarray(image.copy(), format="rgb24")
        upright.color_primaries, upright.color_trc = frame.color_primaries, frame.color_trc
        frame, height, width = upright, upright.height, upright.width
    ready = to_yuv(frame, width, height, RESIZE)
    ready.pts, ready.time_base = pts, time_base
    ready.pict_type = PictureType.NONE  # else the encoder repeats the source's picture types
    return ready
