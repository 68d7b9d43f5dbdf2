"""The table of a reconstruction's measures: the same columns in the terminal, in the report and on the app's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from regen_dist.tables import Column, Table, numbers


@dataclass(frozen=True)
class Measure:
    """Figure of a table: key in the JSON, title, digits, 1 if more is better, -1 if less, 0 if neither; and a unit that
    is not part of the title."""

    key: str
    title: str
    digits: int
    better: int = 0
    scale: float = 1.0
    unit: str = ""

    @property
    def heading(self) -> str:
        return f"{self.title} {self.unit}".rstrip()

    def shown(self, value: float | None) -> str:
        """Return a value with its unit, or a dash where it was not measured."""
        return figure(value, self.digits) + (f" {self.unit}" if self.unit and value is not None else "")


# Columns of the table; each is an attribute of `evaluation.metrics.Measurement`.
RECONSTRUCTION_MEASURES = (
    Measure("psnr_db", "PSNR", 2, 1, unit="dB"),
    Measure("psnr_mean_over_frames_db", "mean frame PSNR", 2, 1, unit="dB"),
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
    columns = [Column("decoder"), *numbers(*(measure.heading for measure in RECONSTRUCTION_MEASURES))]
    return Table(columns, cells, title=title, note=note, styles=styles or {})


def figure(value: float | None, digits: int) -> str:
    """Return a number with so many digits after the point, or a dash where it was not measured."""
    return "–" if value is None else f"{value:.{digits}f}"
