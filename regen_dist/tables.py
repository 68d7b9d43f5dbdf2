"""The one table of this project: for a terminal, in Markdown, or as lines of plain text.

Pages in HTML lay the same tables out by the macro in `evaluation/templates/table.html.j2`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable


_PADDING = {"box": (0, 1, 0, 1), "light": (0, 1, 0, 0), "tight": (0, 0, 0, 0)}  # above, right, below, left of a cell


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Args:
        name: its heading.
        right: true to align cells to the right, as numbers are.
        fixed: true to keep the width in a narrow terminal, where other columns wrap.
        min_width: characters that it keeps when others wrap.
    """

    name: str = ""
    right: bool = False
    fixed: bool = False
    min_width: int | None = None


def numbers(*names: str, fixed: bool = False) -> list[Column]:
    """Return columns that are aligned to the right."""
    return [Column(name, right=True, fixed=fixed) for name in names]


@dataclass(frozen=True)
class Table:
    """A table of texts. Cells are printed as they are: brackets in a name are no markup.

    Args:
        columns: headings, or columns; without any heading the table has no header.
        rows: one text per column.
        title: above it.
        note: below it.
        footer: rows below a line.
        styles: a terminal's style (of rich) by row.
        cell_styles: the same by (row, column).
        frame: style in a terminal: a box, a rule under the header, or the same with a single blank between columns.
        min_width: characters of the whole table in a terminal.
    """

    columns: Sequence[Column | str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    note: str = ""
    footer: Sequence[Sequence[str]] = ()
    styles: Mapping[int, str] = field(default_factory=dict)
    cell_styles: Mapping[tuple[int, int], str] = field(default_factory=dict)
    frame: Literal["box", "light", "tight"] = "box"
    min_width: int | None = None

    @property
    def header(self) -> list[Column]:
        """The columns; a plain heading becomes a left-aligned column."""
        return [Column(each) if isinstance(each, str) else each for each in self.columns]

    def to_markdown(self) -> str:
        """Format as a Markdown table, with title and note where there are any; ends with a newline."""
        rule = ["---:" if column.right else "---" for column in self.header]
        names = [_escaped(column.name) for column in self.header]
        cells = ([_escaped(cell) for cell in row] for row in (*self.rows, *self.footer))
        lines = [f"| {' | '.join(row)} |" for row in (names, rule, *cells)]
        above = [f"### {self.title}", ""] if self.title else []
        return "\n".join([*above, *lines, *(["", self.note] if self.note else [])]) + "\n"

    def to_lines(self) -> Iterator[str]:
        """Yield the header and the rows as plain text, as wide as they are."""
        names = [column.name for column in self.header]
        rows = [names, *self.rows, *self.footer] if any(names) else [*self.rows, *self.footer]
        widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
        for row in rows:
            padded = (
                cell.rjust(width) if column.right else cell.ljust(width)
                for cell, width, column in zip(row, widths, self.header, strict=True)
            )  # fmt: skip
            yield "  ".join(padded).rstrip()

    def show(self, console: Console | None = None) -> None:
        """Print to the terminal, fitted to its width."""
        from rich.console import Console

        console = console or Console()
        console.print(self._for_terminal(console.width))

    def _for_terminal(self, width: int) -> RichTable:
        from rich.box import HEAVY_HEAD, SIMPLE_HEAD
        from rich.table import Table as RichTable
        from rich.text import Text

        made = RichTable(
            title=Text(self.title, "table.title") if self.title else None,
            caption=Text(self.note, "table.caption") if self.note else None,
            title_justify="left", caption_justify="left", box=HEAVY_HEAD if self.frame == "box" else SIMPLE_HEAD,
            padding=_PADDING[self.frame],
            min_width=self.min_width if self.min_width and self.min_width <= width else None,
            show_header=any(column.name for column in self.header),
        )  # fmt: skip
        for column in self.header:
            made.add_column(
                Text(column.name), justify="right" if column.right else "left", no_wrap=column.fixed, overflow="fold",
                min_width=column.min_width,
            )  # fmt: skip
        for number, row in enumerate(self.rows):
            cells = [Text(cell, self.cell_styles.get((number, place), "")) for place, cell in enumerate(row)]
            made.add_row(*cells, style=self.styles.get(number, ""))
        if self.footer:
            made.add_section()
            for row in self.footer:
                made.add_row(*map(Text, row))
        return made


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: "1 shard", "1,024 shards"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _escaped(cell: str) -> str:
    """Return a cell that cannot end early."""
    return cell.replace("|", "\\|").replace("\n", " ")
