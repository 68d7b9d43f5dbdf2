"""The table of a reconstruction's measures: the same columns in the terminal, in the report and on the app's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from regen_dist.tables import Column, Table, numbers


@dataclass(frozen=True)
class Measure:
    """Figure of a table: key in the JSON, title with its unit, digits, and 1 if more is better, -1 if less, 0 if
    neither."""

    key: str
    title: str
    digits: int
    better: int = 0
    scale: float = 1.0


# Columns of the table; each is an attribute of `evaluation.metrics.Measurement`.
RECONSTRUCTION_MEASURES = (
    Measure("psnr_db", "PSNR dB", 2, 1),
    Measure("psnr_mean_over_frames_db", "mean over frames", 2, 1),
    Measure("ssim", "SSIM", 3, 1),
    Measure("vmaf", "VMAF", 1, 1),
)


def measures_table(
    rows: Sequence[Mapping[str, Any]], *, title: str = "", note: str = "", styles: Mapping[int, str] | None = None
) -> Table:
    """Return the table of decoders and their measures.

    Args:
        rows: `label` and the keys of `RECONSTRUCTION_MEASURES` of each decoder.
        title: above the table.
        note: below it.
        styles: a terminal's style by row.
    """
    cells = [
        (row["label"], *(figure(row[measure.key], measure.digits) for measure in RECONSTRUCTION_MEASURES))
        for row in rows
    ]
    columns = [Column("decoder"), *numbers(*(measure.title for measure in RECONSTRUCTION_MEASURES))]
    return Table(columns, cells, title=title, note=note, styles=styles or {})


def figure(value: float | None, digits: int) -> str:
    """Return a number with so many digits after the point, or a dash where it was not measured."""
    return "–" if value is None else f"{value:.{digits}f}"
