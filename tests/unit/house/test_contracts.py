"""The import contracts of pyproject.toml hold, and what the code imports is what pyproject.toml asks for."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from regen_dist.errors import EXTRAS

ROOT = Path(__file__).parents[3]
OWN = {"regen_dist", "launcher", "tools", "tests"}
NOT_IMPORTED = {"ninja"}  # it compiles DeepSpeed's operators
NOT_INSTALLED = {"flash_attn", "apex"}  # optional kernels
COMPANIONS = {"pydantic-core", "markupsafe", "typing-extensions"}  # parts of pydantic and of jinja2, by their own names


@cache
def _sources() -> tuple[Path, ...]:
    return tuple(
        path for folder in ("regen_dist", "launcher", "tools") for path in sorted((ROOT / folder).rglob("*.py"))
    )


@cache
def _nodes(path: Path) -> tuple[ast.AST, ...]:
    """The syntax tree of a file, its module first: parsed once for all tests of the house."""
    return tuple(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def _imported(path: Path) -> set[str]:
    """Top-level names that a file imports, inside functions too."""
    names: set[str] = set()
    for node in _nodes(path):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@cache
def _outside() -> set[str]:
    """Distributions that the library, the launcher and the programs import."""
    names = set().union(*map(_imported, _sources())) - OWN - NOT_INSTALLED - set(sys.stdlib_module_names)
    owners = packages_distributions()
    unknown = sorted(name for name in names if name not in owners)
    assert unknown == [], f"imported, and in no installed distribution: {unknown}"
    return {canonicalize_name(owners[name][0]) for name in names}


def _asked_for() -> set[str]:
    """Distributions of the core and of every extra for users."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [
        *project["dependencies"],
        *(line for extra in set(EXTRAS.values()) for line in project["optional-dependencies"][extra]),
    ]
    return {canonicalize_name(Requirement(line).name) for line in lines} - {"regen-dist"}


def test_imports_keep_to_the_contracts() -> None:
    program = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run([program, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_whatever_is_imported_is_asked_for() -> None:
    assert _outside() - COMPANIONS - _asked_for() == set()


def test_whatever_is_asked_for_is_imported() -> None:
    assert _asked_for() - _outside() - NOT_IMPORTED == set()


@pytest.mark.parametrize("folder", ["regen_dist", "launcher", "tools"])
def test_every_folder_is_a_package(folder: str) -> None:
    """A folder without __init__.py would be left out of the wheel."""
    folders = {path.parent for path in (ROOT / folder).rglob("*.py")}
    assert [str(each) for each in sorted(folders) if not (each / "__init__.py").is_file()] == []
