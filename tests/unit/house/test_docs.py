"""What the pages say exists: files they link to, commands they show, dependencies they explain."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

from regen_dist import errors
from regen_dist.config import load_config
from regen_dist.inference.card import SNIPPET

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").rglob("*.md")
)


def found_on(pages: Iterable[Path], find: Callable[[Path, str], Iterable[object]]) -> dict[str, list[object]]:
    """What `find` finds on each page, given its path and its text; pages without a finding are left out."""
    found = {str(page.relative_to(ROOT)): list(find(page, page.read_text(encoding="utf-8"))) for page in pages}
    return {page: each for page, each in found.items() if each}


def test_links_lead_to_files() -> None:
    def missing(page: Path, text: str) -> list[str]:
        targets = [target for target in re.findall(r"\]\(([^)#\s]+)", text) if not re.match(r"[a-z]+:", target)]
        return [target for target in targets if not (page.parent / target).exists()]

    assert found_on(PAGES, missing) == {}


def test_configs_that_are_named_exist() -> None:
    def missing(_: Path, text: str) -> list[str]:
        named = set(re.findall(r"configs/[\w/.-]+\.yaml", text))
        return [name for name in sorted(named) if not (ROOT / name).is_file()]

    assert found_on(PAGES, missing) == {}


def test_every_dependency_is_explained() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked: dict[str, set[str]] = {Requirement(line).name: set() for line in project["dependencies"]}
    for extra, lines in project["optional-dependencies"].items():
        for name in {Requirement(line).name for line in lines} - {project["name"]}:
            asked.setdefault(name, set()).update({extra} - {"dev", "docs"})
    rows = _rows_of_dependencies()
    assert {name: extras for name, (extras, *_) in rows.items()} == asked


def test_sizes_of_dependencies_are_those_installed() -> None:
    """Within a factor of two, for versions differ; of packages under 1 MB only that they are."""
    wrong = {}
    for name, (_, megabytes, licence) in _rows_of_dependencies().items():
        assert licence, f"{name} has no licence"
        if megabytes == "not measured":
            continue
        try:
            files = distribution(name).files or ()
        except PackageNotFoundError:
            continue  # GPU packages are nowhere, those of the site may be missing
        paths = [str(file.locate()) for file in files]
        sizes = [os.lstat(path).st_size for path in paths if os.path.exists(path)]
        found = sum(sizes) / 1e6
        if not found / 2 - 0.5 < float(megabytes) < found * 2 + 0.5:
            wrong[name] = (megabytes, round(found, 1))
    assert wrong == {}


def _rows_of_dependencies() -> dict[str, tuple[set[str], str, str]]:
    """Extras, MB and licence of every package in the tables of docs/dependencies.md."""
    found = {}
    for line in (ROOT / "docs" / "dependencies.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if re.match(r"`[\w-]+`$", cells[0]) and len(cells) in (4, 5):
            extras = set(re.findall(r"`(\w+)`", cells[1])) if len(cells) == 5 else set()
            found[cells[0].strip("`")] = (extras, cells[-3], cells[-2])
    return found


def test_the_readme_lists_the_exit_codes() -> None:
    readme = (ROOT / "README.md").read_text()
    family = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, errors.RegenError)]
    codes = {each.exit_code for each in family} | {errors.EXIT_OK, errors.EXIT_RESUME}
    assert [code for code in sorted(codes) if f"| {code} |" not in readme] == []


def test_every_config_begins_with_the_command_that_runs_it() -> None:
    configs = sorted((ROOT / "configs").rglob("*.yaml"))
    headers = {path: re.match(r"(#.*\n)+", path.read_text()) for path in configs}
    assert [str(path) for path, header in headers.items() if not header or "regen " not in header.group()] == []


def test_the_checkout_is_installed_editable() -> None:
    """`setup.py` refuses anything else."""
    assert found_on(PAGES, lambda _, text: re.findall(r"pip install '?\..*", text)) == {}


def test_the_demos_run_is_named_where_it_lies() -> None:
    """In the pages and the commands' help: the demo's folder holds more than its run, and is no run folder."""
    run = str(load_config(ROOT / "configs" / "demo" / "embedder.yaml").folder)
    texts = [path.read_text() for path in (*PAGES, *(ROOT / "tools").rglob("*.py"))]
    asked = r"(?:checkpoint (?:list|verify|prune|pin|unpin|export)|--run|such as) (runs/demo[\w/-]*)"
    named = {name for text in texts for name in re.findall(asked, text)}
    assert named == {run, "runs/demo-model"}


def test_tests_that_are_named_exist() -> None:
    """`tests/a/test_b.py::test_c` as it stands, and `…::test_d` for another test of the file named before."""

    def missing(_: Path, text: str) -> Iterator[str]:
        file = ""
        for found in re.finditer(r"`(?:(tests/[\w/]+\.py)|…)(?:::(\w+))?`", text):
            file = found[1] or file
            source = (ROOT / file).read_text() if (ROOT / file).is_file() else ""
            if not source or (found[2] and f"def {found[2]}(" not in source):
                yield found[0]

    assert found_on(PAGES, missing) == {}


def test_the_snippet_of_the_docs_is_the_model_cards() -> None:
    """Which is run, where DeepSpeed cannot be imported, by tests/e2e/test_export.py."""
    text = SNIPPET.format(folder="runs/demo-model", height=64, width=64, channels=8, whole="")
    assert f"```python\n{text}```" in (ROOT / "docs" / "checkpoints.md").read_text()
