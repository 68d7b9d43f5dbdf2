"""Contact sheet: a few frames of the source, their reconstructions, and the errors."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from regen_dist.data.inspect.contact import FAINT, HEAD, INK, MARGIN, blank_sheet, font, save_png, title_width
from regen_dist.evaluation.metrics import psnr_db, squared_error
from regen_dist.inference.frames import Frame

if TYPE_CHECKING:
    from PIL import Image

ERROR_GAIN = 4  # an error of a quarter of the range is shown at full brightness
COLUMNS = 6

_GAP, _LABELS_WIDTH, _CAPTION = 10, 196, 30
_CELL_WIDTH, _LARGEST_CELL_HEIGHT = 236, 320
_WIDEST_TITLE = 900  # pixels; a longer one is shortened in its middle where the pictures are not wider
# matplotlib's colour map of this name as uint8 [256, 3], so that a sheet needs no matplotlib.
MAGMA = np.frombuffer(
    base64.b85decode(
        "000C500jX71_1#G0s#pE0t*5H4FdxY0|OES1QZ1X76t_v1_c@i1{??n9tj5^3J4+#2_y^&CJhQH4ht&~3oQ{0FA@zg6Ad&J4mK4II2I2(7"
        "!N%e5I-6aLL3l89T7(!5lJ8sOCb?XA`ws|5>q7-RVNZyDG^#K5nL=0Uo8<~FA-xg5oI$FXEYFLHV|t#5NtUQZaWWfJr8j|4{|^cbV3hxL="
        "SdF5O+rqcu5d=N)UNW5qeG$druO3Q4)Mo6MR$?eO45GR~3F)6@FS4eq0uRT^D~}7=K_GfMOYdWEy~F8h~dTfM^_nY8-)U9f55ffo>jwa36"
        "tkAAxfqfpsB)b|HayB7u1#f_o!^d?SK>B!Yk?f`KK0gC>E5CV_@0frux8i70`KDS?bBfsQJHkSc+ZD}j?MfRrqNmMnmnEr6LVfSWFVoGyQ"
        "!FMpsff1xmbqcDD@F@B~oeW)^hsxy77GkmQye6BQmur+(KHG8u*dbKusw>NpXH+i}^c)U4yy*YQkI(NW2cEUS##5{GyJaorBbI3k(%06<;"
        "KXJ`KanC?-&_Qp~LT}SUZq-C>)<taCMQqtdYuiU^+(>EONoe0nXy8m|;!S4bPG#gzWaUs~=Tc+nQ)1~<V(M05>sMgxSYYj1U+!C8?_FN-U"
        "taNGUGidG@?>1|WnA=UT=Z#N^=n-AY+UwkT=#HX_i|kLbX@p$T={ri`FUOWdtLf{UiyDt`hj2jgJ1iFVEcz*{E1=wiemhXWBiU}{E%h+l4"
        "kvsXZ@CF{g`R}nri)<YyO>V{-16Bp>F=8Z~mom{-<*OsdN6SbpEV%{;qfauz3Emdj7O~{<eJnw|@S)fBw6H{=I_!zl8q5h5o{a{=|s>#)|"
        "&PjQ+}v{>+d5&5-`jlK#<@{?nEI)tCO)nf}<C{o0)U+@Ag3p#9*X{o<qj<E8!Or~T)t{pqUx>#Y3juKez>{P42;^0fT)w*2<E{P(&1`Mdo"
        "4z5M;Z"
    ),
    np.uint8,
).reshape(256, 3)


@dataclass(frozen=True)
class _SheetRow:
    label: str
    note: str
    cells: list[Image.Image]
    captions: list[str]


def sheet_frames(num_frames: int, columns: int = COLUMNS) -> list[int]:
    """Numbers of frames spread evenly over a video, the first and the last among them."""
    return sorted({round(number) for number in np.linspace(0, num_frames - 1, min(columns, num_frames))})


def write_sheet(
    path: Path,
    numbers: Sequence[int],
    source: Sequence[Frame],
    others: Mapping[str, Sequence[Frame]],
    *,
    title: str = "",
    source_label: tuple[str, str] = ("Source", ""),
    psnr: bool = True,
    errors: bool = True,
) -> None:
    """Write the sheet as PNG: a row for the source, then for each of `others` its frames and its amplified error.

    Args:
        path: the file, replaced in one move.
        numbers: number of each frame, for the captions.
        source: one frame [H, W, 3] for each number.
        others: label to frames that correspond to the source's.
        title: title above the rows.
        source_label: label of the first row, and a note below it.
        psnr: true to write each frame's PSNR, which means something where it reconstructs the source.
        errors: true to draw the error rows.
    """
    cell = _cell_size(source[0])
    rows = [_SheetRow(*source_label, _scaled(source, cell), [f"frame {number}" for number in numbers])]
    for label, frames in others.items():
        quality = [f"{psnr_db(squared_error(a, b)):.1f} dB" for a, b in zip(source, frames, strict=True)]
        note = "PSNR below" if psnr else ""
        rows.append(_SheetRow(label, note, _scaled(frames, cell), quality if psnr else []))
        if errors:
            wrong = [_error_map(a, b) for a, b in zip(source, frames, strict=True)]
            rows.append(_SheetRow(f"|Error| × {ERROR_GAIN}", "mean over colours", _scaled(wrong, cell), []))
    save_png(_draw(rows, cell, title), path)


def _cell_size(frame: Frame) -> tuple[int, int]:
    """(width, height) of a picture on the sheet."""
    height, width = frame.shape[:2]
    scale = min(_CELL_WIDTH / width, _LARGEST_CELL_HEIGHT / height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _scaled(frames: Sequence[Frame], cell: tuple[int, int]) -> list[Image.Image]:
    from PIL import Image

    return [Image.fromarray(np.ascontiguousarray(frame)).resize(cell, Image.Resampling.LANCZOS) for frame in frames]


def _error_map(source: Frame, other: Frame) -> Frame:
    """Mean absolute error over colours, amplified, in the colours of matplotlib's magma: black is right."""
    error = np.abs(source.astype(np.float32) - other).mean(axis=2)
    levels = np.clip(error * ERROR_GAIN, 0, 255).astype(np.uint8)
    mapped: Frame = MAGMA[levels]
    return mapped


def _draw(rows: list[_SheetRow], cell: tuple[int, int], title: str) -> Image.Image:
    columns = len(rows[0].cells)
    heights = [cell[1] + (_CAPTION if row.captions else 0) for row in rows]
    head = HEAD if title else 0
    pictures_width = _LABELS_WIDTH + columns * cell[0] + (columns - 1) * _GAP
    width = 2 * MARGIN + max(pictures_width, min(title_width(title), _WIDEST_TITLE))
    height = 2 * MARGIN + head + sum(heights) + (len(rows) - 1) * _GAP
    image, pen = blank_sheet((width, height), title)
    top = MARGIN + head
    for row, row_height in zip(rows, heights, strict=True):
        middle = top + cell[1] // 2
        pen.text((MARGIN, middle - (11 if row.note else 0)), row.label, fill=INK, font=font(18, bold=True), anchor="lm")
        pen.text((MARGIN, middle + 11), row.note, fill=FAINT, font=font(14), anchor="lm")
        for column, picture in enumerate(row.cells):
            left = MARGIN + _LABELS_WIDTH + column * (cell[0] + _GAP)
            image.paste(picture, (left, top))
            if row.captions:
                place = (left + cell[0] // 2, top + cell[1] + _CAPTION // 2)
                pen.text(place, row.captions[column], fill=FAINT, font=font(16), anchor="mm")
        top += row_height + _GAP
    return image
