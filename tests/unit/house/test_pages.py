"""The pages: their lines, their words, the names of files and code that they give, and their place in the site."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.unit.house.test_contracts import ROOT
from tests.unit.house.test_docs import PAGES

LONGEST_LINE = 299
GUIDES = [page for page in PAGES if "results" not in page.parts and page.name != "CHANGELOG.md"]
TABLE = (ROOT / "docs" / "where-to-change.md").read_text(encoding="utf-8")
CHANGES = re.findall(r"^\| (?!change|what|---)([^|]+) \|", TABLE.split("\n## ")[0], re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_line_is_long(page: Path) -> None:
    """Code blocks aside: a batch script is shown as it is written."""
    text = re.sub(
        r"^```.*?^```$", lambda block: "\n" * block.group().count("\n"), page.read_text("utf-8"), flags=re.M | re.S
    )
    assert [number for number, line in enumerate(text.splitlines(), 1) if len(line) > LONGEST_LINE] == []


def test_no_page_has_a_merge_left_in_it() -> None:
    found = [
        page.name for page in PAGES if re.search(r"^(<{7}|>{7}|={7}$)", page.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert found == []


def _names(source: str) -> set[str]:
    """Functions, classes, constants, and fields as `Class.field`."""
    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{each.target.id}" for each in node.body
                      if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)}  # fmt: skip
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def _wrong_names(text: str) -> list[str]:
    """Names in "`file` (`name`, `name`)" that are not in the file, and files that are not there."""
    wrong = []
    for file, names in re.findall(r"`((?:regen_dist|launcher|tools|configs|tests)/[\w/.]+)`(?: \(((?:`[\w.]+`(?:, )?)+)\))?", text):  # fmt: skip # noqa: E501
        path = ROOT / file
        if not path.exists():
            wrong.append(file)
        elif names:
            wrong += [f"{file}: {name}" for name in re.findall(r"`([\w.]+)`", names)
                      if name not in _names(path.read_text(encoding="utf-8"))]  # fmt: skip
    return wrong


def test_what_is_to_change_is_there() -> None:
    assert len(CHANGES) == 12, CHANGES
    assert _wrong_names("`regen_dist/errors.py` (`Nothing`) and `tools/nothing.py`") == [
        "regen_dist/errors.py: Nothing", "tools/nothing.py",
    ]  # fmt: skip
    assert _wrong_names(TABLE) == []


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    """Also by the library's own short form, as in `models/attention.py`."""
    named = re.findall(r"`((?:\w+/)+\w+\.py)(?:`|:)", page.read_text(encoding="utf-8"))
    assert [file for file in named if not ((ROOT / file).exists() or (ROOT / "regen_dist" / file).exists())] == []


def test_the_glossary_has_each_term_once() -> None:
    terms = re.findall(r"^\| (?!term|---)([^|]+) \|", (ROOT / "docs" / "glossary.md").read_text(), re.MULTILINE)
    assert len(terms) > 30
    assert sorted(terms) == sorted(set(terms))


def _guarantees(text: str) -> list[tuple[str, list[str]]]:
    """Each guarantee with its tests: the nested items of a list."""
    items = re.findall(r"^- (.+(?:\n  (?! ).+)*)\n((?:    - .+\n?)*)", text, re.MULTILINE)
    return [(claim, re.findall(r"^    - `(.+)`$", tests, re.MULTILINE)) for claim, tests in items]


def _is_a_test(name: str) -> bool:
    file, _, test = name.partition("::")
    if not re.fullmatch(r"tests/[\w/]+\.py", file) or not (ROOT / file).is_file():
        return False
    return (
        re.search(
            rf"^ *def {test + chr(92) + '(' if test else 'test_'}",
            (ROOT / file).read_text(encoding="utf-8"),
            re.MULTILINE,
        )
        is not None
    )


def test_each_guarantee_has_a_test() -> None:
    assert _guarantees("- a\n  b\n    - `c`\n- d\n") == [("a\n  b", ["c"]), ("d", [])]
    assert not _is_a_test("tests/unit/house/test_pages.py::test_nothing")
    found = _guarantees((ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8") + "\n")
    assert len(found) > 60
    assert [claim for claim, tests in found if not tests] == [], "name the test that proves it"
    assert [name for _, tests in found for name in tests if not _is_a_test(name)] == [], "no such test"


def test_guarantees_stand_on_one_page() -> None:
    """No other page has a table of them."""
    found = [page.name for page in PAGES if re.search(r"^\| guarantee", page.read_text(encoding="utf-8"), re.MULTILINE)]
    assert found == []
