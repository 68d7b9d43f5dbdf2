"""The rules of CONTRIBUTING.md that a program can check: file sizes, import cycles, names, docstring openings.

Where the code does not follow a rule yet, the exceptions stand here as a list or as a bound. Both may only shrink.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatch
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.unit.house.test_contracts import ROOT, _nodes, _sources

FEWEST_LINES, MOST_LINES, MOST_FUNCTION_LINES, MOST_MODULES_OF_A_NAME = 100, 500, 60, 2
SHORT = """
    regen_dist/checkpoint/retention.py regen_dist/checks/run.py regen_dist/config/preencode.py
    regen_dist/config/version.py regen_dist/evaluation/reconstruction_table.py
    regen_dist/inference/hub/replacements.py regen_dist/jsontext.py
    regen_dist/pixels.py regen_dist/programs.py
    launcher/pipelines/cli.py launcher/preflight/report.py
    tools/evaluate.py tools/preencode.py tools/text.py tools/train.py
"""
LONG = """
    regen_dist/inference/preencode.py regen_dist/observe/hang_detector.py
"""
LONG_FUNCTIONS = {  # of these all but one are commands, whose parameters are their flags
    "tools/checkpoint/maintenance.py:export", "tools/describe/command.py:describe", "tools/evaluate.py:evaluate",
    "tools/generate.py:generate",
    "tools/local_services/slurm_files.py:slurm_conf", "tools/reconstruct.py:reconstruct", "tools/shards/build.py:build",
}  # fmt: skip
COMMON_NAMES = {"cli": 4, "embedder": 4, "encoder": 3, "preencode": 3, "run": 4, "t2v": 4}
CROSS_SUBJECT_TESTS = "tests/unit/launcher/test_shell_variables.py tests/unit/test_older_files.py"
# Upper bounds, measured when each rule was written. Lower one after rewording or inlining; never raise one.
MOST_BAD_OPENINGS = 0
MOST_SMALL_HELPERS = 293
BAD_OPENING = re.compile(
    r"(What|Whatever|Of|As|By|Whether|Where|Wherever|Which|Who|Whose|How|Why|When|For|From|In|On|To|With|That|Those|There)\b"
)


def _named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _modules() -> list[Path]:
    """Files with code of their own: a package's `__init__.py` only gathers names."""
    return [path for path in _sources() if path.name not in ("__init__.py", "__main__.py")]


def _lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def _summary(found: list[str]) -> str:
    """The files that changed last are the first to look at."""
    counts = Counter(name.partition(":")[0] for name in found)
    newest = sorted(counts, key=lambda name: (ROOT / name).stat().st_mtime, reverse=True)
    return ", ".join(f"{name} {counts[name]}" for name in newest[:12])


def _differences(found: set[str], allowed: set[str], rule: str) -> None:
    assert found - allowed == set(), f"new exceptions: {rule}"
    assert allowed - found == set(), "no exceptions any more: take these names out of the list of this test"


def test_a_file_has_the_length_of_one_responsibility() -> None:
    lengths = {_named(path): _lines(path) for path in _modules()}
    short = {name for name, lines in lengths.items() if lines < FEWEST_LINES}
    long = {name for name, lines in lengths.items() if lines > MOST_LINES}
    _differences(short, set(SHORT.split()), f"under {FEWEST_LINES} lines, merge it with the file that uses it")
    _differences(long, set(LONG.split()), f"over {MOST_LINES} lines, split it by responsibility")


def _functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    yield from (node for node in _nodes(path) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def test_a_function_is_one_thought() -> None:
    long = {
        f"{_named(path)}:{node.name}"
        for path in _sources()
        for node in _functions(path)
        if (node.end_lineno or 0) - node.lineno + 1 > MOST_FUNCTION_LINES
    }
    _differences(long, LONG_FUNCTIONS, f"over {MOST_FUNCTION_LINES} lines")


PRIVATE_NAMES = {"told", "mend", "nowhere", "pulse", "verdict", "standin", "standins"}
FIELDS_ON_DISK = [
    "launcher/attempts.py:told",
    "launcher/attempts.py:told",
]  # the field of a rank's exit file, and its use


def _private_names(node: ast.AST) -> list[str]:
    """Names in a node that have one of this project's private words as a part."""
    names = [getattr(node, field, None) for field in ("id", "attr", "arg", "name")]
    return [
        name
        for name in names
        if isinstance(name, str) and PRIVATE_NAMES & {*name.lower().replace("stand_in", "standin").split("_")}
    ]


def test_a_name_is_a_standard_word() -> None:
    """STYLE: a noun for a value (message, reports, conditioning), a verb for a function (report_failure)."""
    source = "def tell_mend(told): return told._told + told.stand_ins + foretold + _Told_apart"
    names = [name for node in ast.walk(ast.parse(source)) for name in _private_names(node)]
    assert sorted(names) == ["_Told_apart", "_told", "stand_ins", "tell_mend", "told", "told", "told"]
    found = [f"{_named(path)}:{name}" for path in _sources() for node in _nodes(path) for name in _private_names(node)]
    assert found == FIELDS_ON_DISK


def _small_helpers(source: str, nodes: Iterable[ast.AST]) -> list[str]:
    """Private functions of at most four lines that are named once beside their definition."""
    found, words = [], Counter(re.findall(r"\w+", source))
    for node in nodes:
        if not isinstance(node, ast.FunctionDef) or not re.match(r"_[^_]", node.name):
            continue
        body = node.body[1:] if ast.get_docstring(node) else node.body
        lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
        if lines <= 4 and words[node.name] == 2:
            found.append(node.name)
    return found


def test_a_small_helper_has_two_callers() -> None:
    """Or a reason to be named: the bound leaves room for those, and no more than there are."""
    source = "def _a():\n    return 1\ndef _b():\n    return _a() + _c() + _c()\ndef _c(): ..."
    assert _small_helpers(source, ast.walk(ast.parse(source))) == ["_a"]
    found = [f"{_named(path)}:{name}" for path in _sources()
             for name in _small_helpers(path.read_text("utf-8"), _nodes(path))]  # fmt: skip
    assert len(found) <= MOST_SMALL_HELPERS, f"{len(found)}: {_summary(found)}"


def _imports(path: Path, modules: Mapping[str, Path]) -> set[str]:
    """Modules that a file needs in order to be imported: no import inside a function or under TYPE_CHECKING."""
    needed = set()
    module = next(iter(_nodes(path)))
    assert isinstance(module, ast.Module)
    for node in module.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            needed |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            needed |= {alias.name for alias in node.names}
    return needed & set(modules)


def _cycle(graph: Mapping[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert _cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}}), "the check finds what it looks for"
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in _modules()}
    assert _cycle({name: _imports(path, modules) for name, path in modules.items()}) == []


def test_no_class_name_twice() -> None:
    where = defaultdict(list)
    for path in _sources():
        for node in _nodes(path):
            if isinstance(node, ast.ClassDef):
                where[node.name].append(f"{_named(path)}:{node.lineno}")
    twice = {name: places for name, places in where.items() if len(places) > 1}
    assert twice == {}, "give the less public one another name"


def test_no_module_name_more_than_twice() -> None:
    names = Counter(path.stem for path in _modules())
    common = {name: count for name, count in names.items() if count > MOST_MODULES_OF_A_NAME}
    more = {name: count for name, count in common.items() if count > COMMON_NAMES.get(name, 0)}
    assert more == {}, "choose another name for the new module"
    assert {name for name in COMMON_NAMES if name not in common} == set(), "take these names out of COMMON_NAMES"


def _opening(node: ast.AST) -> str:
    """The first word of a public docstring; empty where there is none."""
    if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return ""
    name = getattr(node, "name", "module")
    return "" if name.startswith("_") else (ast.get_docstring(node) or "").partition(" ")[0]


def test_docstrings_open_with_a_verb_or_a_noun() -> None:
    assert BAD_OPENING.match("What a run is")
    assert not BAD_OPENING.match("Assemble the batch")
    found = [
        f"{_named(path)}:{getattr(node, 'lineno', 1)} {_opening(node)}"
        for path in _sources()
        for node in _nodes(path)
        if BAD_OPENING.match(_opening(node))
    ]
    assert len(found) <= MOST_BAD_OPENINGS, f"{len(found)}: {_summary(found)}"


BAD_ARGUMENT = re.compile(
    r"^ *[*\w`][*\w, `]*: (of|in|to|by|for|from|with|at|on|per|as|that|when|where|whether|which|what|how|who|whose) "
)


def _arguments(node: ast.AST) -> list[str]:
    """The lines of a docstring from `Args:` or `Attributes:` on."""
    if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return []
    section, found = "", []
    for line in (ast.get_docstring(node) or "").splitlines():
        section = line if re.fullmatch(r"[A-Z]\w+:", line) else section
        found += [line] if section in ("Args:", "Attributes:") else []
    return found


def test_the_entry_of_an_argument_says_what_it_is() -> None:
    """Such as "seed: seed of the order", not "seed: of the order"."""
    assert BAD_ARGUMENT.match("    rows, columns: of the grid.")
    assert not BAD_ARGUMENT.match("    rows, columns: size of the grid.")
    found = [f"{_named(path)}:{getattr(node, 'lineno', 1)} {line.strip()}" for path in _sources()
             for node in _nodes(path) for line in _arguments(node) if BAD_ARGUMENT.match(line)]  # fmt: skip
    assert found == []


@pytest.mark.parametrize("package", ["regen_dist", "launcher"])
def test_nothing_below_tools_knows_benches_or_local_services(package: str) -> None:
    """Neither by an import, inside a function or not, nor by the name of a module that a process is started with."""
    pattern = re.compile(r"\btools[./](bench|local_services|gpu_check)\b")
    found = [
        f"{_named(path)}:{number}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    ]
    assert found == []


def test_the_command_is_named_in_one_constant() -> None:
    found = [
        f"{_named(path)}:{node.lineno}"
        for folder in ("regen_dist", "launcher")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for node in _nodes(path)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.search(r"\btools\.\w+\b", node.value)
    ]
    assert len(found) == 1, found


def test_every_test_file_is_collected_and_linted(pytestconfig: pytest.Config) -> None:
    """pytest and ruff pass over folders named build or dist by default, without a word."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    passed_over = pytestconfig.getini("norecursedirs")
    assert not [
        _named(path)
        for path in files
        for part in path.relative_to(ROOT).parts
        if any(fnmatch(part, pattern) for pattern in passed_over)
    ]
    command = [sys.executable, "-m", "ruff", "check", "--show-files", "tests", "regen_dist", "launcher", "tools"]
    linted = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert not {str(path) for path in [*files, *_sources()]} - set(linted)


def test_unit_tests_follow_the_tree() -> None:
    """`tests/unit/models/test_flops.py` tests `regen_dist/models/flops.py`; `_more` may follow, for a second file."""
    unit, astray = ROOT / "tests" / "unit", []
    for path in sorted(unit.rglob("test_*.py")):
        folder = path.parent.relative_to(unit)
        roots = [ROOT] if folder.parts[:1] in (("launcher",), ("tools",)) else [ROOT / "regen_dist"]
        subjects = {found.stem for root in roots for found in (root / folder).glob("*") if found.name[0] != "_"}
        name = path.stem.removeprefix("test_")
        if folder.parts[:1] != ("house",) and not any(f"{name}_".startswith(f"{one}_") for one in subjects):
            astray.append(_named(path))
    assert sorted(astray) == sorted(CROSS_SUBJECT_TESTS.split())
