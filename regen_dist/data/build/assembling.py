"""Videos out of what benchmarks keep frame by frame: folders of pictures (DAVIS) and raw YUV 4:2:0 (MCL-JCV, UVG).
Nothing is lost: FFV1 in Matroska."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from regen_dist.errors import DataError

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

PICTURES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})
_YUV = re.compile(r"_(?P<width>\d+)x(?P<height>\d+)(?:_(?P<fps>\d+))?", re.IGNORECASE)


def sequences_below(folder: Path) -> list[Path]:
    """Every folder at or below `folder` with pictures in it, and every `.yuv` file, by name; DataError for none."""
    found = [Path(top) for top, _, names in os.walk(folder) if any(_is_picture(name) for name in names)]
    found += folder.rglob("*.yuv")
    if not found:
        raise DataError(
            f"{folder}: no folder of pictures ({', '.join(sorted(PICTURES))}) and no .yuv file below it"
            "; give a folder that has one of these"
        )
    return sorted(found)


def assemble(source: Path, target: Path, fps: float | None = None) -> int:
    """Write the frames of a folder of pictures, or of a raw file, as a lossless video; whole or not at all.

    Args:
        source: a folder whose pictures are the frames in order of their names; or `NAME_WIDTHxHEIGHT[_FPS].yuv`, planar
            8-bit 4:2:0.
        target: ends in `.mkv`.
        fps: frames a second; None takes the raw file's own.

    Returns:
        Number of frames.

    Raises:
        DataError: no rate is known, the pictures have different sizes, or the raw file is not a whole number of frames.
    """
    import av
    from av.video.stream import VideoStream

    raw = source.is_file()
    rate = Fraction(fps or (_raw_shape(source)[2] if raw else 0)).limit_denominator(1001)
    if rate <= 0:
        raise DataError(f"{source}: its frames a second are not known; give --fps")
    temporary, stream, count = target.with_name(f".{target.name}.tmp"), None, 0
    try:
        with av.open(str(temporary), "w", format="matroska") as container:
            for frame in _raw_frames(source) if raw else _pictures(source):
                if stream is None:
                    stream = container.add_stream("ffv1", rate=rate)
                    assert isinstance(stream, VideoStream), "ffv1 is a video codec"
                    stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, frame.format.name
                frame.pts, frame.time_base = count, 1 / rate
                container.mux(stream.encode(frame))
                count += 1
            if stream is None:
                raise DataError(f"{source}: no frames; remove it, or add its frames")
            container.mux(stream.encode(None))
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def _pictures(folder: Path) -> Iterator[VideoFrame]:
    import av
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    size = None
    for path in sorted(path for path in folder.iterdir() if _is_picture(path.name)):
        try:
            with Image.open(path) as picture:
                shown = picture.convert("RGB")
        except (OSError, UnidentifiedImageError) as error:
            raise DataError(f"{path}: cannot be read as a picture: {error}; replace or remove the file") from error
        if size not in (None, shown.size):
            raise DataError(f"{path}: {shown.size} pixels where those before are {size}; one size a folder")
        size = shown.size
        yield av.VideoFrame.from_ndarray(np.asarray(shown), format="rgb24").reformat(format="bgr0")


def _raw_frames(path: Path) -> Iterator[VideoFrame]:
    import av
    import numpy as np

    width, height, _ = _raw_shape(path)
    size = width * height * 3 // 2
    if path.stat().st_size % size:
        raise DataError(
            f"{path}: {path.stat().st_size} bytes are no whole number of {width} x {height} 4:2:0 frames"
            "; name the file after its true size, or copy it again"
        )
    with path.open("rb") as file:
        while data := file.read(size):
            yield av.VideoFrame.from_ndarray(
                np.frombuffer(data, np.uint8).reshape(height * 3 // 2, width), format="yuv420p"
            )


def _raw_shape(path: Path) -> tuple[int, int, int]:
    found = _YUV.search(path.stem)
    if found is None:
        raise DataError(f"{path}: the name of a raw file says its size: NAME_WIDTHxHEIGHT[_FPS].yuv")
    width, height = int(found["width"]), int(found["height"])
    if width % 2 or height % 2 or not width or not height:
        raise DataError(f"{path}: {width} x {height}: 4:2:0 needs even sides")
    return width, height, int(found["fps"] or 0)


def _is_picture(name: str) -> bool:
    return Path(name).suffix.lower() in PICTURES and not name.startswith(".")
