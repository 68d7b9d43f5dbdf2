"""Contact sheets are drawn with one font loader and written by one function."""

from __future__ import annotations

import ast

from tests.unit.house.test_contracts import ROOT, _sources


def test_fonts_are_loaded_in_one_place() -> None:
    found = [
        str(path.relative_to(ROOT))
        for path in _sources()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "truetype"
    ]
    assert found == ["regen_dist/data/inspect/contact.py"]
