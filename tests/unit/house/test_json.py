"""JSON is written in one place, which knows no bare NaN."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path

import pytest

from regen_dist.jsontext import json_text
from tests.unit.house.test_contracts import ROOT, _sources

WRITER = ROOT / "regen_dist" / "jsontext.py"


def _writes_json(path: Path) -> list[int]:
    """Lines that write JSON by the standard library, under whatever name, without `allow_nan=False`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = {alias.asname or alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
               for alias in node.names if alias.name == "json"}  # fmt: skip
    functions = {alias.asname or alias.name for node in ast.walk(tree)
                 if isinstance(node, ast.ImportFrom) and node.module == "json"
                 for alias in node.names if alias.name in ("dump", "dumps", "JSONEncoder")}  # fmt: skip
    lines = []
    for node in ast.walk(tree):
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
        str(path.relative_to(ROOT)): lines for path in _sources() if path != WRITER and (lines := _writes_json(path))
    }
    assert found == {}, "use regen_dist.jsontext.json_text"
    assert _writes_json(WRITER), "the check finds what it looks for"


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
