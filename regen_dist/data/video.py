"""Reading video with PyAV: frame-accurate, from a file or from bytes in memory, only the groups of pictures that
are needed.

A frame's number is its place in order of presentation. It is found by its timestamp, so variable frame rates,
B-frames and files that do not start at zero read like any other.
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import av
import numpy as np
import numpy.typing as npt
from av.video.reformatter import Interpolation

from regen_dist.errors import DataError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

UInt8s = npt.NDArray[np.uint8]

# Bicubic whose support grows with the reduction, so it filters before it drops pixels; exact rounding and full
# chroma cost little and keep the result equal over machines.
RESIZE = (
    Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP
)

_RATE_TOLERANCE = 1e-3  # timestamps in milliseconds make 24 fps look like 24.005


class FrameTable(NamedTuple):
    """Timestamps of a video's frames in order of presentation, and for each keyframe (its timestamp, where to seek
    to for it)."""

    pts: tuple[int, ...]
    keyframes: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class VideoInfo:
    """What a video is. Sides in pixels as shown (rotation applied), `fps` the average frame rate."""

    frames: int
    height: int
    width: int
    fps: float

    @property
    def seconds(self) -> float:
        """Length at the average frame rate."""
        return self.frames / self.fps


class Geometry(NamedTuple):
    """Resize to `height` x `width`, then cut `crop` (height, width) with its corner at (`top`, `left`)."""

    height: int
    width: int
    top: int
    left: int
    crop: tuple[int, int]


class VideoReader:
    """Frames of one video by number. A context manager.

    Args:
        source: a path, or the bytes of a whole file.
        table: the frame table of the same video, when it is known; saves reading through the file once.

    Raises:
        DataError: it is not a video, holds no frames, or its container is damaged.
    """

    def __init__(self, source: Path | bytes, table: FrameTable | None = None) -> None:
        with _av_failures("cannot be opened"):
            file = io.BytesIO(source) if isinstance(source, bytes) else str(source)
            self._container: InputContainer = av.open(file, "r")
        try:
            self.stream = self._video_stream()
            self.table = table or self._read_table()
        except BaseException:
            self._container.close()
            raise

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self._container.close()

    @property
    def rate(self) -> Fraction:
        """Frames per second: the nominal rate, or the average where they differ; DataError if there is neither."""
        average, nominal = self.stream.average_rate, self.stream.guessed_rate
        if average and nominal and abs(average / nominal - 1) < _RATE_TOLERANCE:
            return Fraction(nominal)
        if not average and not nominal:
            raise DataError("the video has no frame rate; remux it, for example with ffmpeg -i IN -c copy OUT.mp4")
        return Fraction(average or nominal or 0)

    def info(self) -> VideoInfo:
        """Frames, sides and rate; decodes the first frame, for only it tells the rotation."""
        for _, frame in self.frames([0]):
            height, width = (frame.width, frame.height) if frame.rotation % 180 else (frame.height, frame.width)
        return VideoInfo(len(self.table.pts), height, width, float(self.rate))

    def frames(self, numbers: Sequence[int]) -> Iterator[tuple[int, VideoFrame]]:
        """The frames of these numbers (increasing), each with its number; DataError when one cannot be decoded."""
        if not 0 <= numbers[0] <= numbers[-1] < len(self.table.pts):
            raise DataError(f"frames {numbers[0]} to {numbers[-1]} were asked for, the video has {len(self.table.pts)}")
        wanted = {self.table.pts[number]: number for number in numbers}
        with _av_failures("cannot be decoded"):
            for frame in self._decode_from(self.table.pts[numbers[0]]):
                number = wanted.pop(frame.pts, None) if frame.pts is not None else None
                if number is not None:
                    if frame.is_corrupt:
                        raise DataError(f"frame {number} is damaged")
                    yield number, frame
                if not wanted:
                    return
        raise DataError(f"{len(wanted)} of {len(numbers)} frames could not be decoded, first: {min(wanted.values())}")

    def _decode_from(self, pts: int) -> Iterator[VideoFrame]:
        """Frames from the keyframe that `pts` depends on; from the very first one where the container seeks too far."""
        keyframe = bisect_right(self.table.keyframes, (pts, 1 << 62)) - 1
        if keyframe > 0:
            frames = self._decode_at(self.table.keyframes[keyframe][1])
            first = next(frames, None)
            if first is not None and first.pts is not None and first.pts <= pts:
                yield first
                yield from frames
                return
        yield from self._decode_at(min(self.table.keyframes[0][1], self.table.pts[0]) if self.table.keyframes else 0)

    def _decode_at(self, position: int) -> Iterator[VideoFrame]:
        self._container.seek(position, stream=self.stream)
        return self._container.decode(self.stream)

    def _video_stream(self) -> VideoStream:
        if not self._container.streams.video:
            raise DataError("it has no video stream")
        stream = self._container.streams.video[0]
        stream.codec_context.thread_count = 1  # the cores are shared out by process, a clip is too short for more
        return stream

    def _read_table(self) -> FrameTable:
        pts: list[int] = []
        keyframes: list[tuple[int, int]] = []
        with _av_failures("is damaged"):
            for packet in self._container.demux(self.stream):
                if packet.is_corrupt:
                    raise DataError(f"packet {len(pts)} is damaged")
                if packet.pts is None or packet.is_discard:
                    continue
                pts.append(packet.pts)
                if packet.is_keyframe:
                    keyframes.append((packet.pts, packet.dts if packet.dts is not None else packet.pts))
        if not pts:
            raise DataError("it has no frames")
        return FrameTable(tuple(sorted(set(pts))), tuple(sorted(keyframes)))


def frame_to_rgb(frame: VideoFrame, height: int | None = None, width: int | None = None) -> UInt8s:
    """One decoded frame as uint8 RGB [height, width, 3], upright, resized with antialiasing (None: not resized).

    The frame's colour tags are followed; where it has none, BT.601 limited range is taken.
    """
    turned = frame.rotation % 180 != 0
    rows, columns = (width, height) if turned else (height, width)
    scaled = frame.reformat(width=columns, height=rows, format="rgb24", interpolation=RESIZE, threads=1)
    image = np.asarray(scaled.to_ndarray(), dtype=np.uint8)
    return np.rot90(image, frame.rotation // 90) if frame.rotation % 360 else image


def fit_geometry(
    height: int, width: int, size: tuple[int, int], short_side: int | None, crop_y: float = 0.5, crop_x: float = 0.5
) -> Geometry:
    """How a frame of `height` x `width` becomes a crop of `size`.

    The frame is resized so that its short side is `short_side` (None: kept), and enlarged further only if the crop
    would not fit. `crop_y`, `crop_x` in [0, 1) place the crop in the room that is left; 0.5 is the centre.
    """
    scale = short_side / min(height, width) if short_side else 1.0
    scale = max(scale, size[0] / height, size[1] / width)
    rows, columns = max(round(height * scale), size[0]), max(round(width * scale), size[1])
    return Geometry(rows, columns, int(crop_y * (rows - size[0] + 1)), int(crop_x * (columns - size[1] + 1)), size)


def read_clip(reader: VideoReader, numbers: Sequence[int], geometry: Geometry, *, flip: bool = False) -> UInt8s:
    """The frames of these numbers as one clip.

    Returns:
        uint8 RGB [3, T, *geometry.crop], contiguous.
    """
    rows, columns = geometry.crop
    clip = np.empty((3, len(numbers), rows, columns), dtype=np.uint8)
    for index, (_, frame) in enumerate(reader.frames(numbers)):
        image = frame_to_rgb(frame, geometry.height, geometry.width)
        image = image[geometry.top : geometry.top + rows, geometry.left : geometry.left + columns]
        clip[:, index] = (image[:, ::-1] if flip else image).transpose(2, 0, 1)
    return clip


@contextmanager
def _av_failures(what: str) -> Iterator[None]:
    try:
        yield
    except (av.FFmpegError, UnicodeDecodeError) as error:
        raise DataError(f"it {what}: {error}") from error
