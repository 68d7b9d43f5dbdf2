"""Contact sheet of a dataset: samples with their first, middle and last frame, their shape and their caption."""

from __future__ import annotations

import math
import os
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from regen_dist.data.format.catalogue import Dataset
from regen_dist.data.format.index import Sample
from regen_dist.data.video.conversion import frame_to_rgb
from regen_dist.data.video.reader import VideoReader
from regen_dist.errors import DataError
from regen_dist.tables import counted

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

# --- drawing shared by all contact sheets ---


@lru_cache(maxsize=16)
def font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Return DejaVu Sans, which comes with matplotlib; without that Pillow's own font, which has fewer scripts."""
    from PIL import ImageFont

    found = find_spec("matplotlib")  # not imported: that takes a fifth of a second at a training's first picture
    file = Path(found.origin if found and found.origin else "").parent / "mpl-data" / "fonts" / "ttf"
    file /= "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    if not file.is_file():
        return cast(ImageFont.FreeTypeFont, ImageFont.load_default(size))
    return ImageFont.truetype(str(file), size)


def save_png(image: Image.Image, path: Path) -> None:
    """Write an image under a temporary name beside `path`, and move it there."""
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial.png")
    try:
        image.save(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


BACKGROUND, INK, FAINT = "#ffffff", "#181c24", "#707886"
MARGIN, HEAD = 28, 52  # pixels around a sheet, and of its title
_TITLE_SIZE = 24


def title_width(title: str) -> int:
    """Return the pixels that a sheet's title takes when nothing of it is left out."""
    return math.ceil(font(_TITLE_SIZE, bold=True).getlength(title))


def blank_sheet(size: tuple[int, int], title: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """Return an empty sheet of (width, height) below its title, which is shortened to fit, and a pen for it."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", size, BACKGROUND)
    pen = ImageDraw.Draw(image)
    bold = font(_TITLE_SIZE, bold=True)
    pen.text((MARGIN, MARGIN), _shortened(title, bold, size[0] - 2 * MARGIN) if title else "", fill=INK, font=bold)
    return image, pen


# --- samples of a dataset ---

_CARD, _ALARM = "#eef0f3", "#be2828"
_GAP, _GUTTER, _LINE = 4, 28, 20
_PICTURE_AREA, _SHEET_WIDTH, _PICTURES, _CAPTION_LINES = 20_000, 1900, 3, 4
_TEXT_TOP = 8


@dataclass(frozen=True)
class _Card:
    """Sample on the sheet: its pictures, or the reason for none, and the lines of text below."""

    title: str
    facts: str
    caption: str
    pictures: list[Image.Image]
    problem: str = ""


def choose_rows(count: int, samples: int, seed: int | None = None) -> list[int]:
    """Choose rows of `count`, in order: evenly spaced, or at random by `seed`."""
    samples = min(samples, count)
    if seed is None:
        return [int((2 * number + 1) * count // (2 * samples)) for number in range(samples)]
    return sorted(np.random.default_rng(seed).choice(count, samples, replace=False).tolist())


def write_contact_sheet(dataset: Dataset, path: Path, rows: Sequence[int]) -> None:
    """Draw the samples of these rows into a PNG. A sample that cannot be read shows why.

    Args:
        dataset: an opened dataset.
        path: the file, replaced in one move; its folder is made.
        rows: rows of the samples to draw, at least one.
    """
    samples = [dataset.sample(row) for row in rows]
    box = _picture_box(samples)
    cards = [_card(dataset, sample, box) for sample in samples]
    name = dataset.store.url.rstrip("/").rpartition("/")[2]
    title = f"{name}: {len(rows):,} of {len(dataset):,} samples"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(_draw(cards, box, title), path)


def _picture_box(samples: Sequence[Sample]) -> tuple[int, int]:
    """Return the (width, height) of a picture: a fixed area in the most frequent aspect ratio."""
    aspect = float(np.clip(np.median([sample.width / sample.height for sample in samples]), 0.5, 2.4))
    return round(math.sqrt(_PICTURE_AREA * aspect)), round(math.sqrt(_PICTURE_AREA / aspect))


def _card(dataset: Dataset, sample: Sample, box: tuple[int, int]) -> _Card:
    facts = f"{sample.height}x{sample.width} × {counted(sample.frames, 'frame')} @ {sample.fps:.4g} fps"
    if sample.motion is not None:
        facts += f", motion {sample.motion:.3g}"
    pictures, problem = [], ""
    try:
        pictures = _pictures(dataset.read(sample), box)
    except DataError as error:
        problem = str(error).split(";")[0]
    return _Card(sample.key, facts, sample.caption or "", pictures, problem)


def _pictures(video: bytes, box: tuple[int, int]) -> list[Image.Image]:
    """Read the first, middle and last frame, as large as the box allows."""
    from PIL import Image

    with VideoReader(video) as reader:
        info = reader.info()
        scale = min(box[0] / info.width, box[1] / info.height)
        height, width = (max(1, round(side * scale)) for side in (info.height, info.width))
        numbers = sorted({0, info.frames // 2, info.frames - 1})
        # One by one: asked for together, all that lies between would be decoded.
        frames = [frame_to_rgb(frame, height, width) for number in numbers for _, frame in reader.frames([number])]
    return [Image.fromarray(np.ascontiguousarray(frame)) for frame in frames]


def _draw(cards: Sequence[_Card], box: tuple[int, int], title: str) -> Image.Image:

    card_width = _PICTURES * box[0] + (_PICTURES - 1) * _GAP
    columns = max(1, min(len(cards), _SHEET_WIDTH // (card_width + _GUTTER)))
    columns = math.ceil(len(cards) / math.ceil(len(cards) / columns))
    rows = [cards[start : start + columns] for start in range(0, len(cards), columns)]
    captions = [[_wrapped(card.caption, font(14), card_width, _CAPTION_LINES) for card in row] for row in rows]
    heights = [box[1] + _TEXT_TOP + _LINE * (2 + max(map(len, row))) for row in captions]
    size = (
        2 * MARGIN + columns * card_width + (columns - 1) * _GUTTER,
        2 * MARGIN + HEAD + sum(heights) + (len(rows) - 1) * _GUTTER,
    )
    image, pen = blank_sheet(size, title)
    top = MARGIN + HEAD
    for row, lines, height in zip(rows, captions, heights, strict=True):
        for number, card in enumerate(row):
            left = MARGIN + number * (card_width + _GUTTER)
            _draw_pictures(image, pen, card, (left, top), box)
            _draw_text(pen, card, lines[number], (left, top + box[1] + _TEXT_TOP), card_width)
        top += height + _GUTTER
    return image


def _draw_pictures(
    image: Image.Image, pen: ImageDraw.ImageDraw, card: _Card, corner: tuple[int, int], box: tuple[int, int]
) -> None:
    left, top = corner
    for number, picture in enumerate(card.pictures):
        start = left + number * (box[0] + _GAP)
        pen.rectangle((start, top, start + box[0] - 1, top + box[1] - 1), fill=_CARD)
        image.paste(picture, (start + (box[0] - picture.width) // 2, top + (box[1] - picture.height) // 2))
    if card.problem:
        room = _PICTURES * box[0] + (_PICTURES - 1) * _GAP
        pen.rectangle((left, top, left + room - 1, top + box[1] - 1), fill=_CARD)
        for number, line in enumerate(_wrapped(card.problem, font(14), room - 6 * _GAP, box[1] // _LINE - 1)):
            pen.text((left + _GAP * 3, top + _GAP * 2 + number * _LINE), line, fill=_ALARM, font=font(14))


def _draw_text(
    pen: ImageDraw.ImageDraw, card: _Card, caption: Sequence[str], corner: tuple[int, int], width: int
) -> None:
    left, top = corner
    pen.text(corner, _shortened(card.title, font(15, bold=True), width), fill=INK, font=font(15, bold=True))
    pen.text((left, top + _LINE), card.facts, fill=FAINT, font=font(14))
    for number, line in enumerate(caption, 2):
        pen.text((left, top + number * _LINE), line, fill=INK, font=font(14))


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int, most: int) -> list[str]:
    """Wrap a text into lines no wider than `width` pixels; the last of `most` lines ends in … if text is left."""
    lines: list[str] = []
    rest = " ".join(text.split())
    while rest:
        end = _prefix(rest, font, width)
        if end < len(rest) and len(lines) == most - 1:
            return [*lines, f"{rest[: max(1, end - 2)].rstrip()} …"]
        space = rest.rfind(" ", 0, end + 1)
        end = space if end < len(rest) and space > 0 else end
        lines.append(rest[:end])
        rest = rest[end:].lstrip()
    return lines


def _prefix(text: str, font: ImageFont.FreeTypeFont, width: int) -> int:
    most = min(len(text), width)  # no character is narrower than a pixel: a long text is not measured whole
    return _fitting(most, lambda count: font.getlength(text[:count]) <= width)


def _shortened(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Shorten a text that is wider than `width` in the middle, because names differ at their ends."""
    if font.getlength(text) <= width:
        return text
    kept = _fitting(len(text), lambda count: font.getlength(_without_middle(text, count)) <= width)
    return _without_middle(text, kept)


def _without_middle(text: str, count: int) -> str:
    """Return `count` characters of a text, from both ends."""
    if count >= len(text):
        return text
    return f"{text[: count - count // 2]}…{text[len(text) - count // 2 :]}"


def _fitting(most: int, fits: Callable[[int], bool]) -> int:
    """Return the largest count up to `most` that fits, at least 1."""
    return bisect_left(range(most + 1), True, lo=2, key=lambda count: not fits(count)) - 1
