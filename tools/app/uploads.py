"""Checks of uploaded files: where they lie, their size, length and picture size, before a frame is decoded."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from regen_dist.errors import DataError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

# Containers that hold their own frames. Playlists (HLS, concat, SDP, DASH) are left out: FFmpeg opens the files that
# they name, which may be any file of this machine.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,ogg,flv,gif"
PICTURES = ("PNG", "JPEG", "WEBP")
_LONGEST_NAME = 80


@dataclass(frozen=True)
class Limits:
    """Upper bounds on an upload.

    Attributes:
        num_bytes: size of the file.
        seconds: length of a video.
        num_frames: frames of a video.
        pixels: pixels of one frame or picture; 1920 x 1080 by default.
    """

    num_bytes: int = 200 * 2**20
    seconds: float = 60.0
    num_frames: int = 1800
    pixels: int = 1920 * 1080

    def text(self) -> str:
        """Describe the limits in one line."""
        return (
            f"at most {self.num_bytes / 2**20:g} MB, {self.seconds:g} seconds, {self.num_frames} frames and "
            f"{self.pixels / 1e6:.3g} million pixels a frame"
        )


@dataclass(frozen=True)
class VideoFacts:
    """Facts from a video's container: frames, seconds, and (height, width) as stored."""

    num_frames: int
    seconds: float
    height: int
    width: int


def shown_name(name: str) -> str:
    """Reduce a file name of the browser to a plain one, for display: the last part, of harmless characters."""
    last = re.split(r"[/\\]", name)[-1]
    plain = re.sub(r"[^\w .+()-]", "_", last).lstrip(". ")
    return plain[:_LONGEST_NAME] or "upload"


def uploaded_file(path: str | os.PathLike[str] | None, folder: Path, limits: Limits) -> Path:
    """Return the real path of an upload.

    Args:
        path: the path that the browser gave back.
        folder: folder of uploads; nothing outside it is read.
        limits: bounds on the size.

    Raises:
        DataError: there is none, it lies outside the folder, is no regular file, is empty, or is too large.
    """
    if not path:
        raise DataError("no file was uploaded; choose one first")
    name = shown_name(os.fspath(path))
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(folder.resolve()):
        raise DataError(f"{name} is not an upload of this page; upload the file itself")
    try:
        found = real.lstat()
    except OSError as error:
        raise DataError(f"{name} is no longer there; upload it again") from error
    if not stat.S_ISREG(found.st_mode):
        raise DataError(f"{name} is not a regular file; upload a video or a picture")
    if not found.st_size:
        raise DataError(f"{name} is empty (0 bytes); upload a video or a picture")
    if found.st_size > limits.num_bytes:
        raise DataError(
            f"{name} has {found.st_size / 2**20:.1f} MB, at most {limits.num_bytes / 2**20:g} MB are allowed; upload a "
            "shorter or smaller file, or start the app with a larger --max-upload-mb"
        )
    return real


def check_video(path: Path, limits: Limits) -> VideoFacts:
    """Read a video's container, and compare it with the limits. No frame is decoded, and reading ends where a limit is
    passed.

    Raises:
        DataError: it is no video, or it is too long or too large.
    """
    import av

    name = shown_name(path.name)
    try:
        options = {"protocol_whitelist": "file", "format_whitelist": CONTAINERS}
        with av.open(f"file:{path}", "r", options=options) as container:
            return _video_facts(container, name, limits)
    except (av.FFmpegError, OSError, ValueError) as error:
        why = "not of an allowed kind" if isinstance(error, ValueError) else getattr(error, "strerror", "") or error
        raise DataError(
            f"{name} is not a video that can be read ({why}); upload an mp4, mov, mkv, webm, avi or gif file"
        ) from error


def _video_facts(container: InputContainer, name: str, limits: Limits) -> VideoFacts:
    from regen_dist.data.video.reader import choose_video

    try:
        stream = choose_video(container)
    except DataError as error:
        raise DataError(f"{name} is not a video: {error}") from error
    _check_sides(name, stream.codec_context.height, stream.codec_context.width, limits)
    count, seconds = _length(container, stream, limits)
    if seconds > limits.seconds:
        raise DataError(
            f"{name} is longer than the {limits.seconds:g} seconds that are allowed; cut it, or start the app with a "
            "larger --max-seconds"
        )
    if count > limits.num_frames:
        raise DataError(f"{name} has more than the {limits.num_frames} frames that are allowed; cut it")
    if not count:
        raise DataError(f"{name} holds no frames; is the file cut off?")
    return VideoFacts(count, seconds, stream.codec_context.height, stream.codec_context.width)


def _length(container: InputContainer, stream: VideoStream, limits: Limits) -> tuple[int, float]:
    """Frames and seconds by the packets, not by the header, which can say anything; stops beyond a limit."""
    base = stream.time_base or Fraction(1, 1000)
    count, first, last = 0, None, 0.0
    for packet in container.demux(stream):
        if not packet.size:
            continue
        count += 1
        at = packet.pts if packet.pts is not None else packet.dts
        if at is not None:
            seconds = float(at * base)
            first = seconds if first is None else min(first, seconds)
            last = max(last, seconds + float((packet.duration or 0) * base))
        if count > limits.num_frames or last - (first or 0.0) > limits.seconds:
            break
    return count, max(0.0, last - (first or 0.0))


def _check_sides(name: str, height: int, width: int, limits: Limits) -> None:
    if height * width > limits.pixels:
        raise DataError(
            f"{name} has {width}x{height} pixels, more than the {limits.pixels / 1e6:.3g} million that are allowed "
            "(1920x1080); scale it down first, for example with ffmpeg -vf scale=-2:720"
        )
    if min(height, width) < 8:
        raise DataError(f"{name} has {width}x{height} pixels; a side must have at least 8")


def check_picture(path: Path, limits: Limits) -> tuple[int, int]:
    """Read a picture's header, and compare it with the limits. Return (height, width).

    Raises:
        DataError: it is no PNG, JPEG or WebP picture, or it is too large.
    """
    from PIL import Image, UnidentifiedImageError

    name = shown_name(path.name)
    try:
        with Image.open(path, formats=PICTURES) as image:
            width, height = image.size
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{name} is not a picture that can be read; upload a PNG, JPEG or WebP file") from error
    _check_sides(name, height, width, limits)
    return height, width
