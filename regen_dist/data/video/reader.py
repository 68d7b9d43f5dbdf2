"""Reading video with PyAV: frame-accurate, from a file or from bytes in memory.

A frame's number is its place in order of presentation, as ffmpeg's command line shows the video. In containers whose
timestamps can be trusted it is found by its timestamp, and only the groups of pictures that are needed are decoded. In
all others (program streams, AVI, GIF, elementary streams …) timestamps are missing, repeated or made up: there frames
are counted as the decoder gives them from the beginning.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from regen_dist.data.video.container import MADE_UP, Aspects, BufferFile, choose_video, is_cut, is_repeat
from regen_dist.data.video.conversion import Converter, Geometry, Orientation, UInt8s, deinterlaced, frame_to_planes
from regen_dist.data.video.timing import FrameTable, gaps, presentation_times
from regen_dist.errors import DataError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream
    from typing_extensions import Buffer

# Containers that give every packet its own timestamp and seek by it. A transport stream does the first, but its clock
# may jump and its packets may be lost.
_INDEXED = {"mov", "mp4", "matroska", "webm"}
_RATE_TOLERANCE = 1e-3  # timestamps in milliseconds make 24 fps look like 24.005
_NO_LIMIT = 1 << 62
_PROGRESSIVE, _FIRST_FRAMES = 1, 16  # FFmpeg's number of the order of fields; frames that show how packets are timed


@dataclass(frozen=True)
class VideoInfo:
    """Properties of a video. Sides in square pixels as shown (rotation applied), `fps` the average frame rate."""

    frames: int
    height: int
    width: int
    fps: float

    @property
    def seconds(self) -> float:
        """Length at the average frame rate."""
        return self.frames / self.fps


class VideoReader:
    """Frames of one video by number. A context manager.

    Args:
        source: a path, or the bytes of a whole file: any buffer, which is read in place.
        table: the frame table of the same video, when it is known; saves reading through the file once.
        convert: give frames as a player shows them (conversion.py): square pixels, standard range, no fields; else as
            they are in the file.

    Raises:
        DataError: it is not a video, holds no frames, or its container is damaged.
    """

    def __init__(self, source: Path | Buffer, table: FrameTable | None = None, *, convert: bool = True) -> None:
        self._source, self._convert = source, convert
        self._container, self.stream = self._open()
        self._counted: tuple[int, Iterator[VideoFrame]] | None = None  # where counting stopped, to go on from there
        self._lost, self._aspects = 0, list[tuple[int, Fraction | None]]()
        try:
            self.table = table or self._read_table()
            self._converter = Converter()
        except BaseException:
            self._container.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._counted = None  # with it goes the file that it counts in
        self._container.close()

    @property
    def rate(self) -> Fraction:
        """Frames per second: the nominal rate, or the average where they differ; DataError if there is neither."""
        average, nominal = self.stream.average_rate, self.stream.guessed_rate
        declared, measured = [rate for rate in (nominal, average) if rate], self._measured_rate()
        if measured:
            near = (rate for rate in declared if abs(measured / rate - 1) < _RATE_TOLERANCE)
            return Fraction(next(near, measured))
        if not average and not nominal:
            raise DataError("the video has no frame rate; remux it, for example with ffmpeg -i IN -c copy OUT.mp4")
        return Fraction(average or nominal or 0)

    def _measured_rate(self) -> Fraction | None:
        """Frames per second by the timestamps of the first and the last frame, without the gaps between them; None if
        these are one frame, or lie too near to each other for their ticks to give a rate that the container does not.
        """
        pts, gaps = self.table.pts, self.gaps
        ticks = pts[-1] - pts[0] - sum(pts[number] - pts[number - 1] for number in gaps)
        steps = len(pts) - 1 - len(gaps)
        if ticks <= 0 or not self.stream.time_base:
            return None
        rates = [rate for rate in (self.stream.guessed_rate, self.stream.average_rate) if rate]
        for rate in rates:
            if abs(steps / rate / self.stream.time_base - ticks) <= 1:
                return Fraction(rate)
        return Fraction(steps / (ticks * self.stream.time_base)).limit_denominator(1001)

    def info(self) -> VideoInfo:
        """Frames, sides and rate; decodes the first frame, for only it has the rotation."""
        frame = self._first_whole()
        height, width = Orientation.of(frame).shown(frame)
        return VideoInfo(len(self.table.pts), height, width, float(self.rate))

    def _first_whole(self) -> VideoFrame:
        """Return the first frame; where it is damaged, that of the first group of pictures which is not."""
        starts = dict.fromkeys((0, *(bisect_left(self.table.pts, shown) for shown, _ in self.table.keyframes)))
        problems: list[DataError] = []
        for number in starts:
            try:
                return next(frame for _, frame in self.frames([number]))
            except DataError as error:
                problems.append(error)
        raise problems[0]

    @cached_property
    def gaps(self) -> list[int]:
        """Numbers of the frames before which the video pauses as if it were another one."""
        return gaps(self.table, float(self.stream.time_base or 0) or 1.0)

    def breaks(self) -> dict[int, str]:
        """Frames at which what follows does not belong with what came before, and why: a gap in time, or another size
        of the picture or shape of its pixels, as far as the table knows of it."""
        tick = float(self.stream.time_base or 0)
        pts = self.table.pts
        found = {n: f"a gap of {(pts[n] - pts[n - 1]) * tick:.1f} s in front of frame {n}" for n in self.gaps}
        found |= {n: f"the shape of pixels changes at frame {n}" for n, _ in self.table.aspects if n > 0}
        found |= {n: f"the picture changes its size at frame {n}" for n in self.table.resized}
        return dict(sorted(found.items()))

    def frames(self, numbers: Sequence[int]) -> Iterator[tuple[int, VideoFrame]]:
        """The frames of these numbers (never decreasing), each once, with its number; `notes` says how they
        were converted.

        Raises:
            DataError: a number is not in the video, or a frame cannot be decoded.
        """
        if not 0 <= numbers[0] <= numbers[-1] < len(self.table.pts):
            raise DataError(
                f"frames {numbers[0]} to {numbers[-1]} were asked for, the video has {len(self.table.pts)}"
                "; ask for less"
            )
        with _av_failures("cannot be decoded"):
            if not self._convert:
                yield from self._decoded(numbers)
                return
            for number, frame in deinterlaced(self._decoded, numbers, len(self.table.pts), self._converter):
                yield number, self._converter(frame, self._aspect_at(number))

    def _aspect_at(self, number: int) -> Fraction | None:
        """Width of a frame's pixels over their height; None where nothing says it."""
        known = [aspect for first, aspect in self.table.aspects if first <= number]
        return known[-1] if known else self.stream.sample_aspect_ratio

    @property
    def notes(self) -> tuple[str, ...]:
        """Return notes, as "KIND: text", on how the frames read so far differ from those in the file."""
        lost = self.table.lost
        damage = [f"damaged: {lost} packet{'s' * (lost > 1)} could not be decoded whole"] if lost else []
        damage += ["damaged: the file is cut off before its end"] if self.table.cut else []
        return (*self._converter.notes, *damage)

    def _decoded(self, numbers: Sequence[int]) -> Iterator[tuple[int, VideoFrame]]:
        """The frames of these numbers as they are in the file."""
        if not self.table.seekable:
            yield from self._count(numbers)
            return
        for run in self._runs(numbers):
            yield from self._run(run)

    def _count(self, numbers: Sequence[int]) -> Iterator[tuple[int, VideoFrame]]:
        """The frames of these numbers, counted from the beginning, or from where the last call stopped."""
        at, frames = self._counted or (0, self._decode_from_start())
        self._counted = None  # in use: another call in between counts for itself
        if at > numbers[0]:
            at, frames = 0, self._decode_from_start()
        wanted = iter(dict.fromkeys(numbers))
        number = next(wanted)
        for frame in frames:
            at += 1
            if at <= number:
                continue
            frame.pts, frame.time_base = self.table.pts[number], self.stream.time_base
            following = next(wanted, None)
            if following is None:
                self._counted = at, frames
            yield number, frame
            if following is None:
                return
            number = following
        raise DataError(
            f"frame {number} could not be decoded; re-encode the file, for example with ffmpeg -i IN OUT.mp4"
        )

    def _decode_from_start(self) -> Iterator[VideoFrame]:
        """Every frame that can be decoded, by a container and a decoder of their own: what is delivered only once (a
        palette, parameter sets) is there again. Damaged packets are counted, and decoded as far as they can be."""
        import av

        container, stream = self._open()
        self._lost, aspects, count = 0, Aspects(stream, container), 0
        self._aspects = aspects.found
        try:
            packets = container.demux(stream)
            while True:
                try:
                    packet = next(packets, None)
                except av.FFmpegError:  # the file breaks off here
                    self._lost += 1
                    packet = None
                if packet is not None and is_repeat(packet):
                    continue
                damaged = packet is not None and packet.is_corrupt
                try:
                    for frame in aspects.decode(packet, count):
                        damaged |= frame.is_corrupt
                        count += 1
                        yield frame
                except av.EOFError:
                    return
                except av.FFmpegError:
                    damaged = True
                self._lost += damaged
                if packet is None or packet.size == 0:
                    return
        finally:
            container.close()

    def _runs(self, numbers: Sequence[int]) -> Iterator[list[int]]:
        """The numbers in parts that are decoded in one go: parted where a whole group of pictures is not needed."""
        run, last_group = [numbers[0]], self._group(numbers[0])
        for number in numbers[1:]:
            group = self._group(number)
            if group > last_group + 1:
                yield run
                run = []
            if not run or number != run[-1]:
                run.append(number)
            last_group = group
        yield run

    def _group(self, number: int) -> int:
        """Return the group of pictures of a frame: the index of the last keyframe not after it."""
        return bisect_right(self.table.keyframes, (self.table.pts[number], _NO_LIMIT)) - 1

    def _run(self, numbers: list[int]) -> Iterator[tuple[int, VideoFrame]]:
        """Decode leanly if the codec allows it; the remaining frames are decoded with everything before them."""
        pts = [self.table.pts[number] for number in numbers]
        done = 0
        for lean in (True, False) if self.stream.codec_context.name == "h264" else (False,):
            first = self._group(numbers[done])
            for frame in self._decode_lean(first, pts[done:]) if lean else self._decode(first, pts[done]):
                if frame.pts is None or frame.pts < pts[done]:
                    continue
                if frame.pts > pts[done] or (lean and frame.is_corrupt):
                    break
                if frame.is_corrupt:
                    raise DataError(
                        f"frame {numbers[done]} is damaged; re-encode the file, for example with ffmpeg -i IN OUT.mp4"
                    )
                yield numbers[done], frame
                done += 1
                if done == len(numbers):
                    return
        raise DataError(
            f"{len(numbers) - done} of {len(numbers)} frames could not be decoded, first: {numbers[done]}"
            "; re-encode the file, for example with ffmpeg -i IN OUT.mp4"
        )

    def _decode_lean(self, group: int, wanted: Sequence[int]) -> Iterator[VideoFrame]:
        """Decode from a group of pictures on, skipping unwanted frames that no other frame refers to, until all of
        `wanted` (timestamps) are out. Interlaced video may keep half a frame in a packet: none of it comes out."""
        context, left = self.stream.codec_context, set(wanted)
        try:
            for packet in self._packets(group):
                context.skip_frame = "DEFAULT" if packet.pts is None or packet.pts in left else "NONREF"
                for frame in packet.decode():
                    if frame.interlaced_frame:
                        return
                    yield frame
                left.discard(packet.pts)
                if not left:
                    break
            for frame in context.decode(None):  # what waits for its turn; the next seek makes the decoder new
                frame.time_base = self.stream.time_base
                yield frame
        finally:
            context.skip_frame = "DEFAULT"

    def _decode(self, group: int, pts: int) -> Iterator[VideoFrame]:
        """Every frame from a group of pictures on; from the very first one where that does not give frame `pts`."""
        frames = (frame for packet in self._packets(group) for frame in packet.decode())
        first = next(frames, None)
        if first is not None and first.pts is not None and first.pts <= pts:
            return chain([first], frames)
        return (frame for packet in self._packets(0) for frame in packet.decode())

    def _packets(self, group: int) -> Iterator[Packet[VideoStream]]:
        """Packets from a keyframe on, or from earlier where the container cannot seek there.

        Some containers seek by time of presentation, others by time of decoding, which is before it. So both are
        tried, and the position reached is checked: a keyframe too late loses frames, one too early costs a whole group.
        """
        if group > 0:
            shown, decoded = self.table.keyframes[group]
            for position in (shown, decoded):
                packets = self._seek(position)
                first = next(packets, None)
                at = None if first is None else first.pts if first.dts is None else first.dts
                if first is not None and at is not None and at <= decoded:
                    return chain([first], packets)
        return self._seek(min(self.table.keyframes[0][1], self.table.pts[0]) if self.table.keyframes else 0)

    def _seek(self, position: int) -> Iterator[Packet[VideoStream]]:
        self._container.seek(position, stream=self.stream)
        return (packet for packet in self._container.demux(self.stream) if not is_repeat(packet))

    def _open(self) -> tuple[InputContainer, VideoStream]:
        import av

        with _av_failures("cannot be opened"):
            source = self._source
            container = av.open(f"file:{source}" if isinstance(source, Path) else BufferFile(source), "r")
        try:
            stream = choose_video(container)
        except BaseException:
            container.close()
            raise
        stream.codec_context.thread_count = 1  # the cores are shared out by process, a clip is too short for more
        return container, stream

    def _read_table(self) -> FrameTable:
        """Read the frame table from the packets if they are reliable, else by decoding."""
        if not _INDEXED & set(self._container.format.name.split(",")):
            return self._counted_table()
        pts: list[int] = []
        keyframes: list[tuple[int, int]] = []
        lost, partial = 0, list[int]()  # the latter: of the packets with which the file breaks off
        with _av_failures("is damaged"):
            for packet in self._container.demux(self.stream):
                if packet.size == 0 and packet.pts is None:
                    continue  # behind the last
                if packet.is_discard or is_repeat(packet):
                    continue
                if packet.pts is None:
                    return self._counted_table()
                if packet.is_corrupt:
                    partial.append(packet.pts)
                else:
                    lost, partial = lost + len(partial), []  # a damaged frame in between is refused when asked for
                pts.append(packet.pts)
                if packet.is_keyframe:
                    keyframes.append((packet.pts, packet.dts if packet.dts is not None else packet.pts))
        whole = len(pts) - len(partial)
        pts, keyframes = pts[:whole], [key for key in keyframes if key[0] not in partial]
        if not pts:
            found = " that are whole: it is cut off in the first" if partial else ""
            raise DataError(f"it has no frames{found}; copy the file again, or leave it out")
        if len(set(pts)) < len(pts) and not self._holds_fields():
            return self._counted_table()
        shown = tuple(sorted(set(pts) - self._undecodable(pts, keyframes)))
        if self._times_fields(shown):
            return self._counted_table()
        return FrameTable(shown, tuple(sorted(keyframes)), lost=lost, cut=bool(partial) or is_cut(self._source))

    def _undecodable(self, pts: Sequence[int], keyframes: Sequence[tuple[int, int]]) -> set[int]:
        """Return the times of pictures before the first keyframe that refer to frames that were cut away (open GOP)."""
        import av

        leading = {each for each in pts if keyframes and each < keyframes[0][0]}
        if not leading:
            return set()
        with suppress(av.FFmpegError):
            for packet in self._seek(min(leading)):
                for frame in packet.decode():
                    if frame.pts is not None and frame.pts >= keyframes[0][0]:
                        return leading
                    if not frame.is_corrupt:
                        leading.discard(frame.pts or 0)
        return leading

    def _holds_fields(self) -> bool:
        """Return true if the first frame is interlaced: its two fields may come in packets of one timestamp."""
        frame = next((frame for packet in self._seek(0) for frame in packet.decode()), None)
        return frame is not None and frame.interlaced_frame

    def _times_fields(self, shown: Sequence[int]) -> bool:
        """Return true if both fields of an H.264 frame have a packet, and a time, of their own: AVCHD, remuxed.
        In a video that begins with whole frames, the intervals show it, which halve."""
        import av

        context = self.stream.codec_context
        if context.name != "h264" or context.field_order == _PROGRESSIVE:
            return False
        with suppress(av.FFmpegError):
            decoded = (frame for packet in self._seek(0) for frame in packet.decode())
            frames = list(islice(decoded, _FIRST_FRAMES))
            intervals = np.diff(shown)
            halved = bool((4 * intervals < 3 * intervals[:1]).any())
            differ = halved or [f.pts for f in frames] != [*shown[: len(frames)]]
            return differ and any(f.interlaced_frame for f in frames)
        return False  # told when it is decoded

    def _counted_table(self) -> FrameTable:
        times: list[int | None] = []
        made_up = MADE_UP & set(self._container.format.name.split(","))
        resized, sides = list[int](), (0, 0)
        for frame in self._decode_from_start():
            if sides not in ((0, 0), (frame.width, frame.height)):
                resized.append(len(times))
            sides = frame.width, frame.height
            times.append(frame.pts)
        if made_up and any(b is None or a is None or b <= a for a, b in pairwise(times)):
            times = [None] * len(times)
        if not times:
            found = f": none of {self._lost} packets can be decoded as {self.stream.name}" if self._lost else ""
            remedy = "copy the file again, convert it (an animated WebP to mp4), or leave it out"
            raise DataError(f"it has no frames{found}; {remedy}")
        rate = self.stream.guessed_rate or self.stream.average_rate
        step = max(1, round(1 / (rate * self.stream.time_base))) if rate and self.stream.time_base else 1
        return FrameTable(
            presentation_times(times, step), (), False, tuple(resized), self._lost, tuple(self._aspects),
            cut=is_cut(self._source),
        )  # fmt: skip


def read_clip(
    reader: VideoReader,
    numbers: Sequence[int],
    geometry: Geometry,
    *,
    flip: bool = False,
    out: UInt8s | None = None,
) -> UInt8s:
    """The frames of these numbers as one clip. A number that comes several times is decoded once.

    Returns:
        uint8 RGB [3, T, *geometry.crop]: `out` where it is given, else new memory, contiguous.
    """
    from av.video.reformatter import VideoReformatter

    rows, columns = geometry.crop
    part = np.s_[geometry.top : geometry.top + rows, geometry.left : geometry.left + columns]
    clip = np.empty((3, len(numbers), rows, columns), dtype=np.uint8) if out is None else out
    reformatter, index = VideoReformatter(), 0
    sides: tuple[int, int] | None = None
    turned: int | None = None
    for number, frame in reader.frames(numbers):
        if frame.rotation != turned:  # which is read at once, the whole orientation is not
            turned, orientation = frame.rotation, Orientation.of(frame)
        shown = orientation.shown(frame)
        if sides not in (None, shown):
            raise DataError(
                f"the picture changes its size at frame {number}"
                "; re-encode it at one size, for example with ffmpeg -i IN -vf scale=640:360 OUT.mp4"
            )
        sides = shown
        start = index
        while index < len(numbers) and numbers[index] == number:
            index += 1
        with _av_failures("cannot be converted to R'G'B'"):
            planes = frame_to_planes(frame, geometry.height, geometry.width, reformatter, orientation)
        for channel, plane in enumerate(planes):
            clip[channel, start:index] = plane[part][:, ::-1] if flip else plane[part]
    return clip


@contextmanager
def _av_failures(what: str) -> Iterator[None]:
    import av

    try:
        yield
    except (av.FFmpegError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error  # without FFmpeg's number and the name, which is said elsewhere
        raise DataError(
            f"it {what}: {why}; copy the file again, or re-encode it, for example with ffmpeg -i IN OUT.mp4"
        ) from error
