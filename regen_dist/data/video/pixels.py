"""From decoded frames to RGB arrays: colour conversion, antialiased resizing, crops."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import numpy.typing as npt
from av.video.reformatter import Interpolation, VideoReformatter

if TYPE_CHECKING:
    from av.video.frame import VideoFrame
    from typing_extensions import Buffer

UInt8s = npt.NDArray[np.uint8]

# Bicubic whose support grows with the reduction, so it filters before it drops pixels; exact rounding and full
# chroma cost little and keep the result equal over machines.
RESIZE = (
    Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP
)


class Orientation(NamedTuple):
    """How a stored picture is shown: rows and columns exchanged (`turned`), then mirrored."""

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

    def apply(self, plane: UInt8s) -> UInt8s:
        """A picture [H, W, ...] as it is shown: a view of it."""
        shown = plane.swapaxes(0, 1) if self.turned else plane
        return shown[:: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]


UPRIGHT = Orientation()


def shown_sides(frame: VideoFrame) -> tuple[int, int]:
    """Height and width of a frame as it is shown."""
    return (frame.width, frame.height) if Orientation.of(frame).turned else (frame.height, frame.width)


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
    """How a frame of `height` x `width` becomes a crop of `size`.

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
    frame: VideoFrame, height: int | None = None, width: int | None = None, reformatter: VideoReformatter | None = None
) -> tuple[UInt8s, UInt8s, UInt8s]:
    """As `frame_to_rgb`, but red, green and blue as three uint8 [height, width], which may be views of one frame.

    Planes, because swscale makes them in a third of the time that it takes for the same pixels interleaved.
    `reformatter` is kept over the frames of a clip: its tables are made once.
    """
    orientation = Orientation.of(frame)
    rows, columns = (width, height) if orientation.turned else (height, width)
    scaled = (reformatter or VideoReformatter()).reformat(
        frame, width=columns, height=rows, format="gbrp", interpolation=RESIZE, threads=1
    )
    green, blue, red = (
        np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)[: scaled.height, : scaled.width]
        for plane in scaled.planes
    )
    return orientation.apply(red), orientation.apply(green), orientation.apply(blue)
