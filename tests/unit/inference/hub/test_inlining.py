"""One module out of several: what is needed of each, under names that do not collide."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from regen_dist.inference.hub import inlining
from regen_dist.inference.hub.inlining import Symbol, inlined

SIZES = '''
"""Sizes."""
import yaml

P = 3  # of a patch
Width = int


def unused() -> None:
    yaml.safe_load("")
'''
FOLD = '''
"""Folding."""
from __future__ import annotations

from collections.abc import Sequence

from inlined_package.sizes import P, unused
from inlined_package.sizes import P as SIDE, Width


# Above the function.
def _fold(x: int) -> int:
    return x * P


def fold(x: Width, more: Sequence[int]) -> int:
    _fold_all = [SIDE for SIDE in (x,)]  # a variable of its own
    return _fold(x) + SIDE + sum(_fold_all) + sum(more)
'''
USER = '''
"""The part that is wanted."""
from __future__ import annotations

import math
from dataclasses import dataclass

from inlined_package import sizes
from inlined_package.fold import fold as folded

P = 2


def _fold(x: int) -> int:
    return x + P


@dataclass
class Record:
    """Evaluates no annotation."""

    value: Missing


class User:
    """Uses both."""

    def load(self) -> None:
        sizes.unused()

    def value(self, P: int = P) -> int:
        from inlined_package.fold import fold
        from flash_attn import flash_attn_func

        assert callable(flash_attn_func)
        found: Missing = math.floor(_fold(1)) + folded(P, (1,)) + fold(1, ())
        return found
'''


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of three modules in the place of ours."""
    folder = tmp_path / "inlined_package"
    folder.mkdir()
    for name, text in {"__init__": "", "sizes": SIZES, "fold": FOLD, "user": USER}.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(inlining, "PACKAGE", "inlined_package")
    inlining._source.cache_clear()
    yield folder
    inlining._source.cache_clear()
    for name in [name for name in sys.modules if name.startswith("inlined_package")]:
        del sys.modules[name]


ROOT = Symbol("inlined_package.user", "User")


def _ran(text: str) -> dict[str, Any]:
    found: dict[str, Any] = {"__name__": "inlined_here"}
    exec(compile(text, "inlined", "exec"), found)
    return found


def test_it_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that two modules use for different things, aliases, variables of the same names, imports in functions."""
    stand_in = types.ModuleType("flash_attn")
    stand_in.flash_attn_func = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in)
    expected = import_module("inlined_package.user").User().value()
    _, text = inlined([ROOT], {ROOT: ("load",)}, "Title.")
    assert _ran(text)["User"]().value() == expected
    assert "inlined_package" not in "\n".join(line for line in text.splitlines() if not line.startswith("#"))


def test_only_what_is_needed_is_taken() -> None:
    """Neither functions that nothing calls nor their imports; comments stay."""
    _, text = inlined([ROOT], {ROOT: ("load",)}, "Title.")
    for absent in ("unused", "yaml", "Record", "import flash_attn", "from flash_attn", "def load"):
        assert absent not in text, absent
    assert "# Above the function.\ndef " in text
    assert "# of a patch" in text
    assert "from collections.abc import Sequence" in text  # an annotation of a function, of the standard library


def test_what_users_may_not_have_is_refused() -> None:
    found = Symbol("inlined_package.sizes", "unused")
    with pytest.raises(ValueError, match="unused needs yaml"):
        inlined([found], {}, "Title.")


def test_whole_modules_are_refused() -> None:
    with pytest.raises(ValueError, match="a whole module cannot be inlined"):
        inlined([ROOT], {}, "Title.")


def test_its_name_tells_versions_apart(package: Path) -> None:
    """The same sources give the same bytes and name; other sources another name."""
    one = inlined([ROOT], {ROOT: ("load",)}, "Title.")
    assert one == inlined([ROOT], {ROOT: ("load",)}, "Title.")
    (package / "sizes.py").write_text(SIZES.replace("P = 3", "P = 4"))
    inlining._source.cache_clear()
    assert inlined([ROOT], {ROOT: ("load",)}, "Title.")[0] != one[0]


def test_run_again_the_first_definitions_stay() -> None:
    """As diffusers runs it for every model: objects made before are still of the module's classes."""
    _, text = inlined([Symbol("inlined_package.fold", "fold")], {}, "Title.")
    found = _ran(text)
    first = found["fold"]
    exec(compile(text, "inlined", "exec"), found)
    assert found["fold"] is first
