"""The pages: their lines, their words, the names of files and code that they give, and their place in the site."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

import click
import typer

from regen_dist.config import EmbedderConfig, T2VConfig
from regen_dist.config.run import Section
from tests.unit.house.test_contracts import ROOT, _nodes, _sources
from tests.unit.house.test_docs import PAGES, found_on
from tools.cli import app

LONGEST_LINE = 299
GUIDES = [page for page in PAGES if "results" not in page.parts and page.name != "CHANGELOG.md"]
TABLE = (ROOT / "docs" / "where-to-change.md").read_text(encoding="utf-8")
CHANGES = re.findall(r"^\| (?!change|what|---)([^|]+) \|", TABLE.split("\n## ")[0], re.MULTILINE)


CODE_BLOCK = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def test_no_line_is_long() -> None:
    """Code blocks aside: a batch script is shown as it is written."""

    def long(_: Path, text: str) -> list[int]:
        text = CODE_BLOCK.sub(lambda block: "\n" * block.group().count("\n"), text)
        return [number for number, line in enumerate(text.splitlines(), 1) if len(line) > LONGEST_LINE]

    assert found_on(PAGES, long) == {}


def test_no_page_has_a_merge_left_in_it() -> None:
    assert found_on(PAGES, lambda _, text: re.findall(r"^(<{7}|>{7}|={7}$)", text, re.MULTILINE)) == {}


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
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
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


def test_files_that_are_named_exist() -> None:
    """Also by the library's own short form, as in `models/attention.py`."""

    def missing(_: Path, text: str) -> list[str]:
        named = re.findall(r"`((?:\w+/)+\w+\.py)(?:`|:)", text)
        return [file for file in named if not ((ROOT / file).exists() or (ROOT / "regen_dist" / file).exists())]

    assert found_on(GUIDES, missing) == {}


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
    assert found_on(PAGES, lambda _, text: re.findall(r"^\| guarantee", text, re.MULTILINE)) == {}


PRIVATE = re.compile(
    r"\b(told|mend(s|ed|ing)?|for ever|stand-ins?|stood in for|looked at|gone back from|as it stands|leaves word"
    r"|in the place of|first word|last word|nobody in|held against|out of thin air|walk(s|ing)? to it)\b",
    re.IGNORECASE,
)


def _prose(text: str) -> str:
    """A page without its code: blocks, spans, and the names of files in links."""
    return re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", " ", text, flags=re.DOTALL)


def test_a_page_uses_standard_words() -> None:
    """STYLE: report, fix, forever, replacement sample, inspect, roll back, unchanged, record, instead of."""
    assert PRIVATE.search("It is told once")
    assert not PRIVATE.search(_prose("`for ever` for every"))

    def private(_: Path, text: str) -> list[str]:
        return [found.group() for found in PRIVATE.finditer(" ".join(_prose(text).split()))]

    assert found_on(GUIDES, private) == {}


LIST_WITHOUT_A_GAP = re.compile(r"^(?![-*|#>` ]|\d+\.)[^\n]+\n[-*] ", re.MULTILINE)


def test_a_list_begins_after_an_empty_line() -> None:
    """Or the site shows it as one paragraph (GitHub does not)."""
    assert found_on(PAGES, lambda _, text: LIST_WITHOUT_A_GAP.findall(CODE_BLOCK.sub("", text))) == {}


def _sections(annotation: object) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for part in get_args(annotation):
        yield from _sections(part)


def _is_a_key(parts: list[str], sections: Sequence[type[Section]]) -> bool:
    fields = [section.model_fields[parts[0]] for section in sections if parts[0] in section.model_fields]
    below = [each for field in fields for each in _sections(field.annotation)]
    return bool(fields) and (len(parts) == 1 or _is_a_key(parts[1:], below))


RUNS = (EmbedderConfig, T2VConfig)
GROUPS = "|".join(sorted({name for run in RUNS for name, field in run.model_fields.items()
                          if list(_sections(field.annotation))}))  # fmt: skip


def test_keys_of_the_config_that_are_named_exist() -> None:
    assert _is_a_key(["model", "decoder", "attention", "backend"], RUNS)
    assert not _is_a_key(["model", "nothing"], RUNS)

    def wrong(_: Path, text: str) -> list[str]:
        text = re.sub(r"```python.*?```", "", text, flags=re.DOTALL)
        named = set(re.findall(rf"(?<![\w./\"])((?:{GROUPS})(?:\.[a-z_0-9]+)+)(?![\w(/])", text))
        files = {name for name in named if name.rpartition(".")[2] in ("py", "md", "json", "yaml", "safetensors")}
        return [name for name in sorted(named - files) if not _is_a_key(name.split("."), RUNS)]

    assert found_on(GUIDES, wrong) == {}


def _messages(text: str) -> list[str]:
    """Quoted messages in the tables of a page: spans of several words that are no command, code or file."""
    rows = "\n".join(line for line in text.splitlines() if line.startswith("| "))
    return [each for each in re.findall(r"`([^`\n]+)`", rows) if re.search(r"(\w+ ){4}\w+", each) and "--" not in each]


def _constant_texts() -> str:
    """All strings in the code, an f-string's fixed parts with a gap between them."""
    nodes = (node for path in _sources() if not path.is_relative_to(ROOT / "tools") for node in _nodes(path))
    return "\n".join(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))


def _not_printed(messages: Sequence[str]) -> list[str]:
    """Fixed parts of messages that the code does not have: without values, names and what is cut off (…)."""
    code = _constant_texts()
    parts = [part.strip(" ,:") for each in messages for part in re.split(r"[…;]|\S*\d\S*|\(\w+\)|\bit\b", each)]
    return [part for part in parts if len(part.split()) > 1 and part not in code]


def test_messages_that_are_quoted_are_printed() -> None:
    quoted = _messages((ROOT / "docs" / "preflight.md").read_text(encoding="utf-8"))
    assert len(quoted) >= 4
    assert _not_printed([*quoted, "12 ranks of the kind that nobody prints"]) == [
        "ranks of the kind that nobody prints"
    ]


def _is_a_module(name: str) -> bool:
    """Of this project: a module, a package, or a name in one."""
    path = ROOT.joinpath(*name.split("."))
    if path.is_dir() or path.with_suffix(".py").is_file():
        return True
    file = path.parent.with_suffix(".py") if path.parent.with_suffix(".py").is_file() else path.parent / "__init__.py"
    return file.is_file() and path.name in re.findall(r"\w+", file.read_text(encoding="utf-8"))


def test_modules_and_folders_that_are_named_exist() -> None:
    ours = "regen_dist|launcher|tools"

    def missing(_: Path, text: str) -> list[str]:
        modules = set(re.findall(rf"\b((?:{ours})(?:\.\w+)+)", text))
        for module, names in re.findall(rf"from ((?:{ours})(?:\.\w+)+) import ([\w, ]+)", text):
            modules |= {f"{module}.{name.strip()}" for name in names.split(",")}
        folders = set(re.findall(rf"`((?:{ours}|configs|tests|docs)/[\w/.-]+)`", text))
        return [name for name in sorted(modules) if not _is_a_module(name)] + [
            name for name in sorted(folders) if not (ROOT / name).exists()
        ]

    assert found_on(GUIDES, missing) == {}


def test_commands_that_are_named_exist() -> None:
    """The changelog aside, which names commands of earlier versions, too."""
    cli = typer.main.get_command(app)

    def unknown(_: Path, text: str) -> Iterator[str]:
        named = r"(?:^|`|# |\$ )regen ([a-z][a-z-]*)(?: ([a-z][a-z-]*)(?![\w./=-]))?"
        for first, second in re.findall(named, text, re.MULTILINE):
            command = cli.get_command(click.Context(cli), first)
            is_group = second and isinstance(command, click.Group)
            if command is None or (is_group and command.get_command(click.Context(command), second) is None):
                yield f"{first} {second}"

    assert found_on([page for page in PAGES if page.name != "CHANGELOG.md"], unknown) == {}
