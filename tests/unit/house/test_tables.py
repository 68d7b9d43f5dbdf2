"""Tables are laid out in one module: nothing else builds one for a terminal or joins the cells of a Markdown row."""

from __future__ import annotations

import ast
import re

from tests.unit.house.test_contracts import ROOT, _sources

WRITER = ROOT / "regen_dist" / "tables.py"
PAGES = [ROOT / "regen_dist" / "config" / "project.py"]  # a whole page of a new project, with the table in it


def _lays_out(source: str) -> list[int]:
    """Lines that import rich's table, or join the cells or write the rule of a Markdown table."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "rich.table":
            lines.append(node.lineno)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            joins = node.value == " | "
            if joins or re.search(r"\|\s*:?---", node.value):
                lines.append(node.lineno)
    return lines


def test_tables_are_laid_out_in_one_module() -> None:
    assert _lays_out('x = " | ".join(cells)')
    assert _lays_out('rule = "| --- | ---: |"')
    assert _lays_out(WRITER.read_text(encoding="utf-8")), "the check finds what it looks for"
    files = [path for path in _sources() if path not in (WRITER, *PAGES)]
    found = {str(path.relative_to(ROOT)): lines for path in files if (lines := _lays_out(path.read_text("utf-8")))}
    assert found == {}, "use regen_dist.tables.Table"
