"""Whole videos, frame by frame: read from a file, written as H.264. Memory does not grow with the length."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from regen_dist.config.run import SPATIAL_COMPRESSION
from regen_dist.data.video.conversion import BT709_MATRIX, LIMITED_RANGE, RESIZE, frame_to_rgb, shown_sides
from regen_dist.data.video.reader import VideoReader
from regen_dist.data.video.scenes import analyse
from regen_dist.errors import DataError, needing_extra
from regen_dist.shared_files import IDLE_S, remove_leftovers, temporary_beside

if TYPE_CHECKING:
    from av.video.stream import VideoStream

Frame = npt.NDArray[np.uint8]  # H W 3, RGB
Seconds = npt.NDArray[np.float64]

BT709 = 1  # the number of this matrix, these primaries and this transfer in the H.264 tables
CLOCK = 90_000  # ticks a second of files in which each frame has its own time
LARGEST_SIDE = 4320  # shorter side of 8K video
LARGEST_WRITTEN_SIDE = 16_384  # x264 takes no more
FALLBACK_RATE = Fraction(25)
HIGHEST_FPS = 1000
LONGEST_FRAME_S = 1001  # rates are written as a fraction of at most this denominator, as 30000/1001 is
ROUNDING_S = 1e-3  # error of times in a file: Matroska and WebM round them to milliseconds


class SourceVideo:
    """Video file that can be read any number of times.

    Args:
        path: the file.
        short_side: resize so that the shorter side has this many pixels; None keeps the size.
        max_frames: read only the first frames.

    Attributes:
        timestamps: float64 [F], seconds from the first frame, increasing; the rate may vary.
        rate: average frames a second.
        stored: (height, width) of the file, upright, in square pixels.
        notes: differences from the frames in the file ("non-square pixels: …"), judged by the first frame.
        height, width: size of the frames that `frames` yields.

    Raises:
        DataError: there is no such file, or it is not a video that can be read.
    """

    def __init__(self, path: Path, *, short_side: int | None = None, max_frames: int | None = None) -> None:
        for name, value in (("short side", short_side), ("largest number of frames", max_frames)):
            if value is not None and value < 1:
                raise DataError(f"the {name} is {value}; it must be at least 1")
        if short_side is not None and short_side > LARGEST_SIDE:
            raise DataError(f"the short side is {short_side}; it must be at most {LARGEST_SIDE}")
        if not path.is_file():
            found = "it is a pipe or a device" if path.exists() else "there is no such file"
            found = "it is a folder" if path.is_dir() else found
            raise DataError(f"no video at {path}: {found}; give the path of a video file")
        if not path.stat().st_size:
            raise DataError(f"{path} is empty (0 bytes); copy the file again, or leave it out")
        self.path = path
        with _named_errors(path), VideoReader(path) as reader:
            self._table = reader.table
            self.timestamps = _seconds(reader, max_frames)
            self.rate = _average_rate(reader, self.timestamps)
            self.stored = shown_sides(next(frame for _, frame in reader.frames([0])))
            self.notes = reader.notes
        scale = short_side / min(self.stored) if short_side else 1.0
        self.height, self.width = (max(1, round(side * scale)) for side in self.stored)

    @property
    def num_frames(self) -> int:
        return len(self.timestamps)

    def frames(self) -> Iterator[Frame]:
        """Yield every frame in order, upright, uint8 [height, width, 3]; DataError at the first damaged frame."""
        with _named_errors(self.path), VideoReader(self.path, self._table) as reader:
            for number, frame in reader.frames(range(self.num_frames)):
                if shown_sides(frame) != self.stored:
                    (height, width), (now_high, now_wide) = self.stored, shown_sides(frame)
                    raise DataError(
                        f"the picture changes from {height}x{width} to {now_high}x{now_wide} at frame {number}; cut "
                        f"the file there, or reconstruct the frames before it (regen reconstruct --max-frames {number})"
                    )
                yield frame_to_rgb(frame, self.height, self.width)

    def cuts(self) -> tuple[int, ...]:
        """Numbers of the frames that begin another shot, increasing; a pass over the whole video."""
        with needing_extra("finding cuts"), _named_errors(self.path), VideoReader(self.path, self._table) as reader:
            return analyse(frame for _, frame in reader.frames(range(self.num_frames))).cuts


def num_frames_at(timestamps: Seconds, fps: float) -> int:
    """Number of frames at another rate between the first and the last of these times, which are rounded."""
    return int(timestamps[-1] * fps + min(ROUNDING_S * fps, 0.5)) + 1


def _seconds(reader: VideoReader, max_frames: int | None) -> Seconds:
    pts = np.asarray(reader.table.pts[:max_frames], dtype=np.float64)
    seconds: Seconds = (pts - pts[0]) * float(reader.stream.time_base or Fraction(1, CLOCK))
    return seconds


def _average_rate(reader: VideoReader, timestamps: Seconds) -> Fraction:
    """Average frame rate from the timestamps; the container's own where it agrees with them, as they may be rounded."""
    steps, tick = len(timestamps) - 1, max(float(reader.stream.time_base or 0), ROUNDING_S)
    declared = [rate for rate in (reader.stream.guessed_rate, reader.stream.average_rate) if rate]
    if not steps:
        return Fraction(next(iter(declared), FALLBACK_RATE))
    near = (rate for rate in declared if abs(steps / rate - timestamps[-1]) <= tick)
    rate = Fraction(next(near, Fraction(steps / timestamps[-1]).limit_denominator(LONGEST_FRAME_S)))
    return max(rate, Fraction(1, LONGEST_FRAME_S))  # of slides


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Add the file's name to the reader's errors."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{path} cannot be used as a video: {error}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}; check its owner and mode") from error


class VideoWriter:
    """Writer of uint8 RGB frames as an H.264 mp4 (yuv420p, BT.709), under a temporary name until it is complete.

    A context manager: a normal exit moves the file to `path`, an exception removes it, and the next writer in the
    folder what a killed process left. An odd side gets one more row or column, a copy of the last, because 4:2:0 needs
    even sides.

    Args:
        path: the file; its folder must exist.
        rate: frames a second; the pace of the file, unless the time of every frame is passed to `write`.
        crf: x264's constant rate factor; 0 is lossless except for the 4:2:0 colour.
        preset: x264's preset.
        remedy: advice of the error where the disk refuses.

    Raises:
        DataError: the file cannot be written.
    """

    def __init__(
        self, path: Path, rate: Fraction | float, *, crf: int = 16, preset: str = "medium",
        remedy: str = "choose another --out, or make room",
    ) -> None:  # fmt: skip
        self.path, self._remedy, self._rate = path, remedy, Fraction(rate).limit_denominator(LONGEST_FRAME_S)
        if self._rate <= 0:
            raise DataError(
                f"{path.name}: the frame rate is {float(rate):g}; it must be at least 1 frame in {LONGEST_FRAME_S} s"
            )
        # Without cpu-independent, x264 writes other bytes for the same frames where a side is no multiple of 16: its
        # rate control then depends on uninitialised memory (core 165, measured). From RGB, swscale puts chroma in the
        # middle of its pixels (chromaloc=1); untagged, H.264 means their left edge: colours half a pixel aside.
        self._options = {"crf": str(crf), "preset": preset, "x264-params": "cpu-independent=1:chromaloc=1"}
        self._partial = temporary_beside(path)
        self._stream: VideoStream | None = None
        self._last_tick = -1

    def __enter__(self) -> VideoWriter:
        import av

        if not self.path.parent.is_dir():
            raise DataError(
                f"{self.path} cannot be written: there is no folder {self.path.parent}"
                "; make it, or choose another --out"
            )
        remove_leftovers(self.path.parent, idle_s=IDLE_S)
        with self._write_errors():
            self._container = av.open(f"file:{self._partial}", "w", format="mp4", options={"movflags": "+faststart"})
        return self

    def write(self, frame: Frame, seconds: float | None = None) -> None:
        """Add one frame [H, W, 3]. All frames have one size; `seconds` is given for all of them or for none."""
        from av.video.frame import VideoFrame

        frame = np.ascontiguousarray(pad_sides(frame, 2))
        with self._write_errors():
            if self._stream is None:
                self._stream = self._add_stream(frame, timed=seconds is not None)
            picture = VideoFrame.from_ndarray(frame, format="rgb24").reformat(
                format="yuv420p",
                interpolation=RESIZE,
                dst_colorspace=BT709_MATRIX,
                dst_color_range=LIMITED_RANGE,
            )
            tick = self._last_tick + 1  # frames that are nearer to each other than a tick would have one time
            self._last_tick = tick if seconds is None else max(tick, round(seconds * CLOCK))
            picture.pts = self._last_tick
            picture.time_base = self._stream.codec_context.time_base
            self._container.mux(self._stream.encode(picture))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
            else:
                with suppress(OSError):  # the disk refuses the file's end, too; the error that is on its way says so
                    self._container.close()
        finally:
            self._partial.unlink(missing_ok=True)

    def _finish(self) -> None:
        if self._stream is None:
            self._container.close()
            raise DataError(f"{self.path.name} was given no frames")
        with self._write_errors():
            self._container.mux(self._stream.encode(None))
            self._container.close()
            with self._partial.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(self._partial, self.path)

    def _add_stream(self, frame: Frame, *, timed: bool) -> VideoStream:
        check_written_sides(self.path, *frame.shape[:2])
        stream = self._container.add_stream("libx264", rate=self._rate, options=self._options)
        stream.height, stream.width = frame.shape[:2]
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.time_base = Fraction(1, CLOCK) if timed else 1 / self._rate
        context.color_range = LIMITED_RANGE
        context.colorspace = context.color_primaries = context.color_trc = BT709
        return stream

    @contextmanager
    def _write_errors(self) -> Iterator[None]:
        import av

        try:
            yield
        except (av.FFmpegError, OSError) as error:
            why = error.strerror or error
            raise DataError(f"{self.path} cannot be written: {why}; {self._remedy}") from error


def check_written_sides(path: Path, height: int, width: int) -> None:
    """Raise DataError where frames have more pixels a side than a file takes."""
    if max(height, width) > LARGEST_WRITTEN_SIDE:
        raise DataError(
            f"{path} would have frames of {height}x{width}; H.264 takes at most {LARGEST_WRITTEN_SIDE} pixels a side. "
            "Make them smaller (--short-side)"
        )


def write_video(path: Path, frames: Iterable[Frame], rate: Fraction | float, *, crf: int = 16) -> None:
    """Write frames [H, W, 3] as an mp4, whole or not at all; see `VideoWriter`."""
    with VideoWriter(path, rate, crf=crf) as writer:
        for frame in frames:
            writer.write(frame)


def pad_sides(frame: Frame, multiple: int = SPATIAL_COMPRESSION) -> Frame:
    """Repeat the last row and column until both sides are multiples of `multiple`; cropping the top left undoes it."""
    rows, columns = (-side % multiple for side in frame.shape[:2])
    return np.pad(frame, ((0, rows), (0, columns), (0, 0)), mode="edge") if rows or columns else frame
