"""Facts that containers and streams give about a video: its stream, the shapes of its pixels, its end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from regen_dist.errors import DataError
from regen_dist.tables import counted

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream
    from typing_extensions import Buffer

MADE_UP = {"avi"}  # containers without timestamps: those that ffmpeg gives count packets, B-frames out of order
_DEFAULT_PIXELS = 5_000_000  # ffmpeg counts the mark "default" as so many pixels
_HEAD = 4096


def choose_video(container: InputContainer) -> VideoStream:
    """The stream with the most pixels, where one that is marked as default counts for five million more; of equals the
    first, but no single picture beside a video (animated AVIF). Attached pictures (cover art, thumbnails) are no video.

    Raises:
        DataError: there is no such stream, or no decoder for any.
    """
    from av.stream import Disposition

    streams = container.streams.video
    pictures = Disposition.attached_pic | Disposition.timed_thumbnails
    videos = [stream for stream in streams if not stream.disposition & pictures]
    if not videos:
        what = f", only {counted(len(streams), 'attached picture')} (cover art)" if streams else ""
        raise DataError(f"it has no video stream{what}; leave the file out")
    decodable = [stream for stream in videos if stream.codec_context is not None]  # so PyAV says it, against its types
    if not decodable:
        raise DataError(
            "there is no decoder for its video"
            "; convert it with an FFmpeg that has one, for example ffmpeg -i IN OUT.mp4"
        )

    def score(stream: VideoStream) -> tuple[int, bool]:
        pixels = stream.codec_context.width * stream.codec_context.height
        return pixels + _DEFAULT_PIXELS * bool(stream.disposition & Disposition.default), stream.frames != 1

    return max(decodable, key=score)  # the first of equals


def is_cut(source: Path | Buffer) -> bool:
    """Return true if a Matroska or AVI file is shorter than its header says, the only sign that it is truncated."""
    with source.open("rb") if isinstance(source, Path) else nullcontext(BufferFile(source)) as file:
        size = file.seek(0, os.SEEK_END)
        return max(_matroska_end(file), _avi_end(file)) > size


def is_repeat(packet: Packet[VideoStream]) -> bool:
    """Return true for a packet without bytes: the frame before it stays (Theora, QuickTime). The one behind the last
    packet has no time."""
    return packet.size == 0 and packet.dts is not None


def _matroska_end(file: BinaryIO | BufferFile) -> int:
    """End of a Matroska file by the size of its segment (RFC 8794, 4.4; RFC 9559); 0: it is not given, or it is no
    such file."""
    file.seek(0)
    head, at = file.read(_HEAD), 0
    for element in (b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"):  # the header, the segment
        if not head.startswith(element, at) or len(head) < at + 12 or not head[at + 4]:
            return 0
        width = 9 - head[at + 4].bit_length()
        size = int.from_bytes(head[at + 4 : at + 4 + width]) & ~(1 << 7 * width)
        if size == (1 << 7 * width) - 1:
            return 0  # written before it was known
        at += 4 + width + size
    return at


def _avi_end(file: BinaryIO | BufferFile) -> int:
    """End of an AVI file by the sizes of its RIFF chunks (OpenDML: one a gigabyte); 0: as of Matroska."""
    end = 0
    while True:
        file.seek(end + end % 2)
        head = file.read(8)
        size = int.from_bytes(head[4:], "little")
        if not head.startswith(b"RIFF") or size in (0, 0xFFFFFFFF):
            return end
        end += end % 2 + 8 + size


class Aspects:
    """Shapes of pixels, as they are found while a video is decoded: `found` has the frames at which they change.

    Where the container has it (AVI), that counts; otherwise it is the decoder's, which changes when a packet goes in:
    the frame of that packet may come out later.
    """

    def __init__(self, stream: VideoStream, container: InputContainer) -> None:
        self._stream, self._fixed = stream, bool(MADE_UP & set(container.format.name.split(",")))
        self._waiting: tuple[int | None, Fraction | None] | None = None  # the time of that frame, and its aspect
        self._last: Fraction | None = None
        self.found: list[tuple[int, Fraction | None]] = []

    def decode(self, packet: Packet[VideoStream] | None, number: int) -> Iterator[VideoFrame]:
        """The frames that come out when a packet goes in, the first of which is frame `number`."""
        frames = self._stream.codec_context.decode(packet)
        container_aspect, codec_aspect = (
            self._stream.sample_aspect_ratio,
            self._stream.codec_context.sample_aspect_ratio,
        )
        aspect = container_aspect if self._fixed else codec_aspect or container_aspect
        if aspect != self._last and packet is not None:
            self._waiting, self._last = (packet.pts, aspect), aspect
        for at, frame in enumerate(frames, number):
            if not self.found:
                self.found.append((at, aspect))
                self._waiting = None
            elif self._waiting and (frame.key_frame if self._waiting[0] is None else frame.pts == self._waiting[0]):
                self.found.append((at, self._waiting[1]))
                self._waiting = None
            yield frame


class BufferFile:
    """A buffer as a file to read from. `io.BytesIO` would copy all of it, unless it is `bytes`."""

    def __init__(self, data: Buffer) -> None:
        self._view, self._at = memoryview(data).cast("B"), 0

    def read(self, size: int) -> bytes:
        data = bytes(self._view[self._at : self._at + size])
        self._at += len(data)
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, len(self._view))[whence])
        return self._at

    def tell(self) -> int:
        return self._at
