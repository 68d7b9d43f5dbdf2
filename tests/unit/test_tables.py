"""Tables: for terminals of any width, in Markdown, as plain lines."""

from __future__ import annotations

import io

from rich.console import Console

from regen_dist.tables import Column, Table, numbers

TABLE = Table(
    ["run", *numbers("step", "loss")], [("a[red]b", "10", "0.5"), ("c|d", "2000", "")], title="runs [of today]",
    note="two runs", footer=[("best", "", "0.5")],
)  # fmt: skip


def _shown(table: Table, width: int = 60) -> list[str]:
    output = io.StringIO()
    table.show(Console(file=output, width=width))
    return [line.rstrip() for line in output.getvalue().splitlines()]


def test_markdown_aligns_numbers_and_escapes_bars() -> None:
    assert TABLE.to_markdown().splitlines() == [
        "### runs [of today]", "", "| run | step | loss |", "| --- | ---: | ---: |", "| a[red]b | 10 | 0.5 |",
        "| c\\|d | 2000 |  |", "| best |  | 0.5 |", "", "two runs",
    ]  # fmt: skip


def test_plain_lines_are_aligned_and_have_no_trailing_blanks() -> None:
    assert list(TABLE.to_lines()) == [
        "run      step  loss",
        "a[red]b    10   0.5",
        "c|d      2000",
        "best            0.5",
    ]


def test_a_terminal_shows_names_as_they_are() -> None:
    lines = _shown(TABLE)
    assert lines[0] == "runs [of today]"
    assert lines[2].split() == ["┃", "run", "┃", "step", "┃", "loss", "┃"]
    assert lines[4].split() == ["│", "a[red]b", "│", "10", "│", "0.5", "│"]
    assert lines[6].startswith("├")  # the footer lies below a line
    assert lines[-1] == "two runs"


def test_fixed_columns_keep_their_width_where_others_wrap() -> None:
    table = Table([Column("what"), Column("state", fixed=True)], [("a long text " * 4, "requeued")], frame="tight")
    lines = _shown(table, width=24)
    assert sum("requeued" in line for line in lines) == 1
    assert max(map(len, lines)) <= 24
    assert "".join(line.replace("requeued", "") for line in lines[2:]).count("long") == 4


def test_a_terminal_of_one_character() -> None:
    assert _shown(Table(["what", "state"], [("run", "lost")], min_width=60), width=1)


def test_without_headings_there_is_no_header() -> None:
    table = Table(["", *numbers("")], [("width", "64")])
    assert list(table.to_lines()) == ["width  64"]
    assert len(_shown(table)) == 3
