"""What every contact sheet is drawn with: the font, and a PNG that is replaced in one move."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageFont


@lru_cache(maxsize=16)
def font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Return DejaVu Sans, which comes with matplotlib."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def save_png(image: Image.Image, path: Path) -> None:
    """Write an image under a temporary name beside `path`, and move it there."""
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial.png")
    try:
        image.save(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
