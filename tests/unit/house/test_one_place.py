"""Acts of one module: writing JSON, laying out tables, drawing contact sheets, telling runs from exports."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from regen_dist.jsontext import json_text
from tests.unit.house.test_contracts import ROOT, _nodes, _sources

JSON_WRITER = ROOT / "regen_dist" / "jsontext.py"


def _writes_json(path: Path) -> list[int]:
    """Lines that write JSON by the standard library, under whatever name, without `allow_nan=False`."""
    modules = {alias.asname or alias.name for node in _nodes(path) if isinstance(node, ast.Import)
               for alias in node.names if alias.name == "json"}  # fmt: skip
    functions = {alias.asname or alias.name for node in _nodes(path)
                 if isinstance(node, ast.ImportFrom) and node.module == "json"
                 for alias in node.names if alias.name in ("dump", "dumps", "JSONEncoder")}  # fmt: skip
    lines = []
    for node in _nodes(path):
        if not isinstance(node, ast.Attribute | ast.Name):
            continue
        by_module = (
            isinstance(node, ast.Attribute) and node.attr in ("dump", "dumps", "JSONEncoder")
            and isinstance(node.value, ast.Name) and node.value.id in modules
        )  # fmt: skip
        if by_module or (isinstance(node, ast.Name) and node.id in functions):
            lines.append(node.lineno)
    return lines


def test_every_json_goes_through_the_one_writer() -> None:
    found = {
        str(path.relative_to(ROOT)): lines
        for path in _sources()
        if path != JSON_WRITER and (lines := _writes_json(path))
    }
    assert found == {}, "use regen_dist.jsontext.json_text"
    assert _writes_json(JSON_WRITER), "the check finds what it looks for"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_null(value: float) -> None:
    """Wherever they stand; everything else is as `json.dumps` writes it."""

    def refuse(name: str) -> None:
        raise AssertionError(f"a bare {name}")

    text = json_text({"a": [1.5, value, (value, {"b": value})], "c": "NaN", "d": True, value: 1}, sort_keys=False)
    assert json.loads(text, parse_constant=refuse) == {
        "a": [1.5, None, [None, {"b": None}]], "c": "NaN", "d": True, str(value): 1,
    }  # fmt: skip
    plain = {"x": 0.1, "ö": [1, None, "é"], "z": {"y": 1e300}}
    assert json_text(plain, indent=1) == json.dumps(plain, indent=1)


# Tables are laid out in one module: nothing else builds one for a terminal or joins the cells of a Markdown row.


TABLE_WRITER = ROOT / "regen_dist" / "tables.py"
PAGES = [ROOT / "regen_dist" / "config" / "project.py"]  # a whole page of a new project, with the table in it


def _lays_out(nodes: Iterable[ast.AST]) -> list[int]:
    """Lines that import rich's table, or join the cells or write the rule of a Markdown table."""
    lines = []
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module == "rich.table":
            lines.append(node.lineno)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            joins = node.value == " | "
            if joins or re.search(r"\|\s*:?---", node.value):
                lines.append(node.lineno)
    return lines


def test_tables_are_laid_out_in_one_module() -> None:
    for source in ('x = " | ".join(cells)', 'rule = "| --- | ---: |"'):
        assert _lays_out(ast.walk(ast.parse(source)))
    assert _lays_out(_nodes(TABLE_WRITER)), "the check finds what it looks for"
    files = [path for path in _sources() if path not in (TABLE_WRITER, *PAGES)]
    found = {str(path.relative_to(ROOT)): lines for path in files if (lines := _lays_out(_nodes(path)))}
    assert found == {}, "use regen_dist.tables.Table"


# Contact sheets are drawn with one font loader and written by one function.


def test_fonts_are_loaded_in_one_place() -> None:
    found = [
        str(path.relative_to(ROOT))
        for path in _sources()
        for node in _nodes(path)
        if isinstance(node, ast.Attribute) and node.attr == "truetype"
    ]
    assert found == ["regen_dist/data/inspect/contact.py"]


def test_nobody_else_asks_whether_a_folder_is_a_run_or_an_export() -> None:
    """Deciding for oneself is a second door. What makes exports looks at its own target folder."""
    door, allowed = ROOT / "regen_dist" / "checkpoint", {ROOT / "regen_dist" / "inference" / "export.py"}
    callers = [
        str(path.relative_to(ROOT))
        for path in _sources()
        if path.parent != door and path not in allowed
        for node in _nodes(path)
        if isinstance(node, ast.Name) and node.id in ("is_export", "read_model", "checkpoint_weights")
        and isinstance(node.ctx, ast.Load)
    ]  # fmt: skip
    assert callers == []
