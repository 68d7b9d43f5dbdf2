"""Rows as a table of a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from launcher.jobs.figures import duration
from launcher.jobs.rows import Row

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

_WIDE = 130  # columns from which on notes and job ids have columns of their own
_COLOURS = {"running": "green", "stopping": "yellow", "requeued": "yellow", "failed": "red", "lost": "red"}
_NUMBERS = ("size", "again", "step", "loss", "clips/s", "ETA", "saved")


def print_rows(console: Console, rows: Sequence[Row]) -> None:
    """A table; where it is narrow, what there is to say stands under it."""
    wide = console.width >= _WIDE
    console.print(_table(rows, wide))
    for row in rows if not wide else ():
        if row.note:
            console.print(f"{row.run}: {row.note}", highlight=False, markup=False, soft_wrap=True)


def _table(rows: Sequence[Row], wide: bool) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0) if wide else 0)  # fits in 80 columns
    table.add_column("run", overflow="fold", min_width=8)
    if wide:
        table.add_column("job", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for name in _NUMBERS:
        table.add_column(name, justify="right", no_wrap=True)
    if wide:
        table.add_column("")
    for row in rows:
        job, note = ([_plain(row.job or "")], [_plain(row.note)]) if wide else ([], [])
        table.add_row(
            _plain(row.run), *job, _plain(row.state, _COLOURS.get(row.state, "")), *_numbers(row, wide), *note
        )
    return table


def _plain(text: str, style: str = "") -> Text:
    """Without markup: a name may hold brackets."""
    from rich.text import Text

    return Text(text, style=style)


def _numbers(row: Row, wide: bool) -> list[str]:
    step = "" if row.step is None else f"{row.step}/{row.steps}" if row.steps else f"{row.step}"
    return [
        f"{row.nodes}x{row.ranks_per_node}" if row.nodes else "",
        f"{row.restarts}" if row.restarts else "",
        step,
        "" if row.loss is None else f"{row.loss:.4g}",
        "" if row.clips_per_s is None else f"{row.clips_per_s:.4g}",
        "" if row.eta_s is None else duration(row.eta_s),
        _saved(row, wide),
    ]


def _saved(row: Row, wide: bool) -> str:
    if row.checkpoint_step is None:
        return ""
    if row.checkpoint_age_s is None:
        return f"{row.checkpoint_step}"
    age = duration(row.checkpoint_age_s)
    return f"{row.checkpoint_step}, {age} ago" if wide else f"{row.checkpoint_step} {age}"
