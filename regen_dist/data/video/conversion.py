"""Conversion of decoded frames to what a player shows: square pixels, BT.709 of standard range, progressive.

Most frames are that already and pass as they are. The others go through filters of ffmpeg. Orientation is not done
here: frames keep their display matrix.
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from regen_dist.data.video.colour import HDR, WIDE, Primaries, Transfer, cube
from regen_dist.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from av.filter.context import FilterContext
    from av.video.frame import VideoFrame
    from av.video.reformatter import VideoReformatter
    from PIL import Image
    from typing_extensions import Buffer

    Frames = Callable[[Sequence[int]], Iterator[tuple[int, VideoFrame]]]


HDR_KIND, WIDE_KIND, INTERLACED_KIND, PIXELS_KIND = "HDR", "wide primaries", "interlaced", "non-square pixels"
_FLAGS = "bicubic+accurate_rnd+full_chroma_int+full_chroma_inp"
_BT2020_MATRICES = (9, 10)  # with constant luminance or without
_UNREADABLE_MATRICES = {  # swscale has no conversion from them
    8: "YCgCo", 10: "BT.2020 of constant luminance", 11: "Y'D'zD'x", 12: "chromaticity-derived",
    13: "constant luminance", 14: "ICtCp", 15: "IPT-C2", 16: "YCgCo-Re", 17: "YCgCo-Ro",
}  # fmt: skip
_UNSPECIFIED = 2
LIMITED_RANGE, FULL_RANGE = 1, 2  # FFmpeg's numbers
BT709_MATRIX = 1
_LARGEST_SIDE = 32_768  # swscale can do no more, and a wrong shape of pixels must not ask for gigabytes


class LeftOut(NamedTuple):
    """Kinds of videos that are skipped instead of being converted."""

    hdr: bool = False
    interlaced: bool = False

    @classmethod
    def of(cls, hdr: str, interlaced: str) -> LeftOut:
        """Parse the values of `--hdr` and `--interlaced`; raise DataError for others."""
        for name, value, convert in (("--hdr", hdr, "tone-map"), ("--interlaced", interlaced, "deinterlace")):
            if value not in (convert, "leave-out"):
                raise DataError(f"{name} {value}: must be {convert} or leave-out")
        return cls(hdr == "leave-out", interlaced == "leave-out")

    def recorded(self) -> dict[str, str]:
        hdr, interlaced = ("leave-out" if self.hdr else "tone-map"), "leave-out" if self.interlaced else "deinterlace"
        return {"hdr": hdr, "interlaced": interlaced}

    def reason(self, notes: Iterable[str]) -> str:
        """Explain why a video with these notes (`Converter.notes`) is skipped, as "KIND: reason"; empty if it is
        not."""
        unwanted = {HDR_KIND: "--hdr", WIDE_KIND: "--hdr"} if self.hdr else {}
        unwanted |= {INTERLACED_KIND: "--interlaced"} if self.interlaced else {}
        for kind, _, what in (note.partition(": ") for note in notes):
            if kind in unwanted:
                return f"{kind}: {what.partition(',')[0]}, and {unwanted[kind]} is leave-out"
        return ""


class FrameProperties(NamedTuple):
    """Frame properties that determine the conversion: sides, format, colours (numbers of H.273)."""

    width: int
    height: int
    format: str
    matrix: int
    range: int
    transfer: int
    primaries: int

    @classmethod
    def of(cls, frame: VideoFrame) -> FrameProperties:
        """Read the properties of a frame. Missing primaries follow from transfer and matrix."""
        primaries, transfer = frame.color_primaries, frame.color_trc
        if primaries in (0, _UNSPECIFIED) and (transfer in HDR or frame.colorspace in _BT2020_MATRICES):
            primaries = int(Primaries.BT2020)
        names = (frame.format.name, frame.colorspace, frame.color_range)
        return cls(frame.width, frame.height, *names, transfer, primaries)

    @property
    def colours(self) -> str:
        """Explain why the colours must be converted, beginning with the kind; empty if they need not."""
        if self.transfer in HDR:
            return f"{HDR_KIND}: {HDR[self.transfer]}, tone-mapped to BT.709 of standard range"
        if self.primaries in WIDE:
            return f"{WIDE_KIND}: {WIDE[self.primaries]}, converted to BT.709"
        return ""


class Converter:
    """Makes frames of one video presentable, one at a time. `notes` says what was done so far, once each."""

    def __init__(self) -> None:
        self._aspect = Fraction(1)
        self._unchanged: tuple[FrameProperties, Fraction | None] | None = (
            None  # frames like the last one pass as they are
        )
        self._filters: dict[tuple[FrameProperties, int, int], _Filters] = {}
        self.notes: dict[str, None] = {}

    def __call__(self, frame: VideoFrame, pixel_aspect: Fraction | None = None) -> VideoFrame:
        """The frame, or a new one in its place with the same time and orientation.

        Args:
            frame: the decoded frame.
            pixel_aspect: width of its pixels over their height; None or 0: square.

        Raises:
            DataError: its colours or the shape of its pixels cannot be converted.
        """
        properties = FrameProperties.of(frame)
        if (properties, pixel_aspect) == self._unchanged:
            return frame
        self._aspect = Fraction(pixel_aspect) if pixel_aspect else Fraction(1)
        if properties.matrix in _UNREADABLE_MATRICES and not frame.format.is_rgb:
            matrix = _UNREADABLE_MATRICES[properties.matrix]
            raise DataError(
                f"its colours are {matrix} (matrix {properties.matrix} of H.273), which cannot be converted; "
                "convert it to BT.709 first, or leave it out"
            )
        width, height = self._square(properties)
        if not properties.colours and (width, height) == (properties.width, properties.height):
            self._unchanged = properties, pixel_aspect
            return frame
        if (width, height) != (properties.width, properties.height):
            aspect = f"{self._aspect.numerator}:{self._aspect.denominator}"
            note = f"{PIXELS_KIND}: of {aspect}, {properties.height}x{properties.width} scaled to {height}x{width}"
            self.notes[note] = None
        if properties.colours:
            self.notes[properties.colours] = None
        key = properties, width, height
        if key not in self._filters:
            self._filters.clear()  # a change within a video is rare, a filter's memory is that of some frames
            self._filters[key] = _Filters(properties, frame, _steps(properties, width, height))
        (done,) = self._filters[key].run(frame)
        return _tagged(done, frame, properties)

    def _square(self, properties: FrameProperties) -> tuple[int, int]:
        """Width and height in square pixels. The side whose pixels are long grows: nothing is thrown away."""
        width = round(properties.width * max(self._aspect, Fraction(1)))
        height = round(properties.height / min(self._aspect, Fraction(1)))
        if max(width, height) > _LARGEST_SIDE:
            raise DataError(
                f"pixels of {self._aspect} would make {properties.height}x{properties.width} into {height}x{width}, "
                f"more than {_LARGEST_SIDE} a side; fix the file, for example with ffmpeg -i IN -vf setsar=1 OUT.mp4"
            )
        return width, height


def deinterlaced(
    frames: Frames, numbers: Sequence[int], count: int, converter: Converter
) -> Iterator[tuple[int, VideoFrame]]:
    """Yield the frames of `frames(numbers)`, with interlaced ones deinterlaced (bwdif, one frame for one).

    From the first interlaced frame on, each frame is decoded with its neighbours, so that a frame looks the same
    however it was reached. A frame that is not flagged as interlaced passes as it is.

    Args:
        frames: gives decoded frames by their numbers, with these.
        numbers: never decreasing, without repetitions.
        count: number of frames of the video.
        converter: notes that the video was deinterlaced.
    """
    rest = list(dict.fromkeys(numbers))
    for done, (number, frame) in enumerate(frames(rest)):
        if frame.interlaced_frame:
            converter.notes[f"{INTERLACED_KIND}: frames of two fields, deinterlaced by bwdif"] = None
            yield from _with_neighbours(frames, rest[done:], count)
            return
        yield number, frame


def _with_neighbours(frames: Frames, numbers: list[int], count: int) -> Iterator[tuple[int, VideoFrame]]:
    wanted = set(numbers)
    wider = sorted({near for number in numbers for near in range(max(number - 1, 0), min(number + 2, count))})
    filters: _Filters | None = None
    waiting: list[tuple[int, VideoFrame]] = []  # went in and are not out
    last = -2

    def out(ready: list[VideoFrame]) -> Iterator[tuple[int, VideoFrame]]:
        for done in ready:
            number, source = waiting.pop(0)
            _timed(done, source)
            if number in wanted:
                yield number, done

    for number, frame in frames(wider):
        if filters is not None and (number != last + 1 or not filters.takes(frame)):
            yield from out(filters.finish())
            filters = None
        filters = filters or _Filters(FrameProperties.of(frame), frame, [("bwdif", "mode=send_frame:deint=interlaced")])
        waiting.append((number, frame))
        yield from out(filters.run(frame))
        last = number
    if filters is not None:
        yield from out(filters.finish())


def _steps(properties: FrameProperties, width: int, height: int) -> list[tuple[str, str]]:
    """Filters in order with their arguments: colours at full precision, then the shape of pixels, then 8 bits."""
    resize = (
        [("scale", f"{width}:{height}:flags={_FLAGS}")]
        if (width, height) != (properties.width, properties.height)
        else []
    )
    if not properties.colours:
        return [*resize, ("setsar", "1")]
    known = f"in_color_matrix={_matrix(properties)}:flags={_FLAGS}"
    steps = [("scale", known), ("format", "gbrp16le"), ("lut3d", "interp=tetrahedral"), *resize]
    return [*steps, ("setsar", "1"), ("scale", f"flags={_FLAGS}"), ("format", "gbrp")]


def _matrix(properties: FrameProperties) -> str:
    """Name of the matrix that makes R'G'B' of a frame; where it is unknown, that of its primaries."""
    if properties.matrix in (0, _UNSPECIFIED, 3):
        return "bt2020" if properties.primaries == Primaries.BT2020 else "bt709"
    return "auto"


class _Filters:
    """A chain of ffmpeg's filters for frames with the same properties."""

    def __init__(self, properties: FrameProperties, frame: VideoFrame, steps: Sequence[tuple[str, str]]) -> None:
        from av.filter import Graph

        self._properties, self._graph = properties, Graph()
        self._graph.threads = 1
        base = frame.time_base or Fraction(1, 1000)
        size = f"video_size={properties.width}x{properties.height}:pix_fmt={properties.format}"
        colours = f"colorspace={frame.colorspace}:range={frame.color_range}"
        node = self._graph.add("buffer", f"{size}:time_base={base}:pixel_aspect=1/1:{colours}")
        with ExitStack() as stack:
            for name, options in steps:
                if name == "lut3d":
                    options = f"file='{stack.enter_context(_table_file(properties))}':{options}"
                node = self._linked(node, self._graph.add(name, options))
            self._linked(node, self._graph.add("buffersink"))
            self._graph.configure()

    def _linked(self, node: FilterContext, following: FilterContext) -> FilterContext:
        node.link_to(following)
        return following

    def takes(self, frame: VideoFrame) -> bool:
        """Return true if a frame has the properties that the chain was made for."""
        return FrameProperties.of(frame) == self._properties

    def run(self, frame: VideoFrame) -> list[VideoFrame]:
        """Put a frame in; what is ready comes out."""
        self._graph.vpush(frame)
        return self._ready()

    def finish(self) -> list[VideoFrame]:
        self._graph.vpush(None)
        return self._ready()

    def _ready(self) -> list[VideoFrame]:
        import av

        ready = []
        with suppress(av.BlockingIOError, av.EOFError):
            while True:
                ready.append(self._graph.vpull())
        return ready


@contextmanager
def _table_file(properties: FrameProperties) -> Iterator[str]:
    """Name of a file with the table of colours. ConfigError where there is no room: no fault of the video, which a
    build would leave out."""
    with ExitStack() as stack:
        try:
            name = stack.enter_context(tempfile.NamedTemporaryFile(suffix=".cube")).name
            Path(name).write_text(cube(properties.transfer, properties.primaries), encoding="ascii")
        except OSError as error:
            raise ConfigError(
                f"the table that converts colours of HDR cannot be written: {error}; make room for temporary files, "
                "or set TMPDIR to a folder with room"
            ) from error
        yield name


def _tagged(done: VideoFrame, source: VideoFrame, properties: FrameProperties) -> VideoFrame:
    _timed(done, source)
    if properties.colours:
        done.colorspace, done.color_range = 0, FULL_RANGE  # 0: R'G'B'
        done.color_primaries = int(Primaries.BT709)
        done.color_trc = standard_transfer(properties.transfer)
    return done


def _timed(done: VideoFrame, source: VideoFrame) -> None:
    """Restore the time of the source, because filters count time in their own units."""
    done.pts = source.pts
    if source.time_base is not None:
        done.time_base = source.time_base


def standard_transfer(transfer: int) -> int:
    """The transfer of a converted frame: that of sRGB stays, all others (HDR, BT.2020's) are BT.709."""
    return transfer if transfer == Transfer.IEC61966_2_1 else int(Transfer.BT709)


def to_yuv(frame: VideoFrame, width: int, height: int, interpolation: int) -> VideoFrame:
    """A frame as yuv420p of limited range, tagged as what it is: R'G'B' by BT.709's matrix (and sRGB, where it does not
    say otherwise), YUV by its own."""
    is_rgb = frame.format.is_rgb or frame.format.name == "pal8"
    ready = frame.reformat(
        width=width,
        height=height,
        format="yuv420p",
        interpolation=interpolation,
        dst_colorspace=BT709_MATRIX if is_rgb else None,
        dst_color_range=LIMITED_RANGE,
        threads=1,
    )
    if is_rgb:
        ready.colorspace = BT709_MATRIX
        if ready.color_primaries == _UNSPECIFIED:
            ready.color_primaries = int(Primaries.BT709)
        if ready.color_trc == _UNSPECIFIED:
            ready.color_trc = int(Transfer.IEC61966_2_1)
    return ready


def has_centred_chroma(frame: VideoFrame) -> bool:
    """Return true if the chroma of a 4:2:0 frame lies in the middle of its pixels (JPEG, whatever swscale makes of
    R'G'B'), false if at their left edge (nearly all video).

    PyAV does not show the mark that says it. So a copy with the same mark gets an edge of colour, and it is looked at
    where swscale sees that.
    """
    copy = frame.reformat(width=16, height=16, format="yuva420p", threads=1)
    for plane, rows in zip(copy.planes, ([128], [64] * 4 + [192] * 4, [128], [255]), strict=True):
        row = bytes(rows * (plane.width // len(rows))).ljust(plane.line_size, b"\0")
        plane.update(row * plane.height)
    blue = frame_to_rgb(copy)[8, :, 2].astype(float)
    return bool((blue[7] - blue[0]) / (blue[15] - blue[0]) < 0.4)  # one half where the edge is at pixel 7 itself


UInt8s = npt.NDArray[np.uint8]


def picture_to_rgb(image: Image.Image) -> UInt8s:
    """A picture that PIL opened as uint8 sRGB [H, W, 3]: upright, its colour profile applied, transparent parts over
    white; of an animation, the first picture.

    Raises:
        ValueError: its values are no colours (floating point up to 1, or integers of more than 16 bits).
        OSError, SyntaxError: the file is damaged.
    """
    from PIL import Image, ImageOps

    profile = image.info.get("icc_profile")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        low, high = values.min(initial=0), values.max(initial=0)
        if low < 0 or high > 0xFFFF or (image.mode == "F" and not 1 < high <= 0xFF):  # floats up to 1 would be black
            raise ValueError(f"its values, {low:g} to {high:g} ({image.mode}), are no colours of 8 or 16 bits")
        is_deep = image.mode.startswith("I;16") or high > 0xFF  # PIL would clip them at 255
        image = Image.fromarray((values >> 8 if is_deep else values).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        clear = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")
    elif image.mode not in ("L", "CMYK"):
        image = image.convert("RGB")
    pixels: UInt8s = np.asarray(_in_srgb(image, profile).convert("RGB"))
    return pixels


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """A picture (RGB, L or CMYK) by its colour profile as sRGB; as it is where it has none that can be used."""
    from PIL import ImageCms

    if profile:
        with suppress(ImageCms.PyCMSError, OSError):
            found = ImageCms.profileToProfile(image, BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode="RGB")
            return found or image
    return image


# From decoded frames to RGB arrays: colour conversion, antialiased resizing, crops.

# Bicubic whose support grows with the reduction, so it filters before it drops pixels; exact rounding and full
# chroma cost little and keep the result equal over machines.
RESIZE = 0x4 | 0x40000 | 0x2000 | 0x4000  # swscale's flags of the same names as in `_FLAGS`


class Orientation(NamedTuple):
    """Orientation of a stored picture: rows and columns transposed (`turned`), then mirrored."""

    turned: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    @classmethod
    def of(cls, frame: VideoFrame) -> Orientation:
        """Read a frame's display matrix: of its eight right-angled orientations, mirrored ones too, the nearest."""
        matrix = frame.side_data.get("DISPLAYMATRIX")
        if matrix is None:
            return UPRIGHT
        # A stored place (x, y), y downwards, is shown at (a x + c y, b x + d y).
        a, b, _, c, d, *_ = struct.unpack("<9i", memoryview(cast("Buffer", matrix))[:36])
        if abs(a) + abs(d) >= abs(b) + abs(c):
            return cls(False, d < 0, a < 0)
        return cls(True, b < 0, c < 0)

    def shown(self, frame: VideoFrame) -> tuple[int, int]:
        """Height and width of a frame of this orientation as it is shown."""
        return (frame.width, frame.height) if self.turned else (frame.height, frame.width)

    def apply(self, plane: UInt8s) -> UInt8s:
        """A picture [H, W, ...] as it is shown: a view of it."""
        shown = plane.swapaxes(0, 1) if self.turned else plane
        return shown[:: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]


UPRIGHT = Orientation()


def shown_sides(frame: VideoFrame) -> tuple[int, int]:
    """Height and width of a frame as it is shown."""
    return Orientation.of(frame).shown(frame)


class Geometry(NamedTuple):
    """Resize to `height` x `width`, then cut `crop` (height, width) with its corner at (`top`, `left`)."""

    height: int
    width: int
    top: int
    left: int
    crop: tuple[int, int]


def fit_geometry(
    height: int, width: int, size: tuple[int, int], short_side: int | None, crop_y: float = 0.5, crop_x: float = 0.5
) -> Geometry:
    """Compute how a frame of `height` x `width` becomes a crop of `size`.

    The frame is resized so that its short side is `short_side` (None: kept), and enlarged further only if the crop
    would not fit. `crop_y`, `crop_x` in [0, 1) place the crop in the room that is left; 0.5 is the centre.
    """
    scale = short_side / min(height, width) if short_side else 1.0
    scale = max(scale, size[0] / height, size[1] / width)
    rows, columns = max(round(height * scale), size[0]), max(round(width * scale), size[1])
    return Geometry(rows, columns, int(crop_y * (rows - size[0] + 1)), int(crop_x * (columns - size[1] + 1)), size)


def frame_to_rgb(frame: VideoFrame, height: int | None = None, width: int | None = None) -> UInt8s:
    """One decoded frame as uint8 RGB [height, width, 3], upright, resized with antialiasing (None: not resized).

    The frame's colour tags are followed; where it has none, BT.601 limited range is taken.
    """
    return np.stack(frame_to_planes(frame, height, width), axis=-1)


def frame_to_planes(
    frame: VideoFrame,
    height: int | None = None,
    width: int | None = None,
    reformatter: VideoReformatter | None = None,
    orientation: Orientation | None = None,
) -> tuple[UInt8s, UInt8s, UInt8s]:
    """Convert a frame like `frame_to_rgb`, but to three planes uint8 [height, width], which may be views of one frame.

    Planes, because swscale makes them in a third of the time of interleaved pixels. A `reformatter` that is kept over a
    clip makes its tables once; an `orientation` that is known need not be read, which takes as long as a small frame.
    """
    from av.video.reformatter import VideoReformatter

    orientation = orientation or Orientation.of(frame)
    rows, columns = (width, height) if orientation.turned else (height, width)
    scaled = (reformatter or VideoReformatter()).reformat(
        frame, width=columns, height=rows, format="gbrp", interpolation=RESIZE, threads=1
    )
    green, blue, red = (
        np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)[: scaled.height, : scaled.width]
        for plane in scaled.planes
    )
    return orientation.apply(red), orientation.apply(green), orientation.apply(blue)
