"""Nothing that we start imports out of the folder that the user is in."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.supervise import launch
from regen_dist.programs import regen, start_safely, with_safe_path
from tests.unit.house.test_contracts import _nodes, _sources

PROGRAM = """
import os, sys
from regen_dist.data.pool import worker_pool
def value(): return os.getpid()
if __name__ == "__main__":
    with worker_pool(1) as pool:
        assert pool.submit(os.getpid).result() != os.getpid()
"""


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, which becomes the current one, of files with the names of modules; whichever runs leaves a mark."""
    folder = tmp_path / "mine"
    (folder / "tools").mkdir(parents=True)
    mark = f"open({str(tmp_path / 'mark')!r}, 'a').write(__name__ + '\\n')\nraise SystemExit(3)\n"
    for name in ("random.py", "tempfile.py", "pickle.py", "tools/__init__.py", "tools/train.py", "submitit.py"):
        (folder / name).write_text(mark)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    return tmp_path / "mark"


def test_ranks_run_our_modules(trap: Path, tmp_path: Path) -> None:
    assert launch(regen("--version"), ranks=1, logs=tmp_path / "logs") == 0
    assert launch([sys.executable, "-m", "tools.cli", "--version"], ranks=1, logs=tmp_path / "logs") == 0
    assert not trap.exists()


def test_an_empty_entry_of_the_path_is_the_current_folder_too(trap: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}/nothing::"}
    assert launch(regen("--version"), ranks=1, logs=tmp_path / "logs", environment=environment) == 0
    assert not trap.exists()


def test_workers_of_a_pool(trap: Path, tmp_path: Path) -> None:
    """Of a program that is not itself in the safe mode, as any script of a user's."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    ended = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert not trap.exists()


def test_a_process_sees_to_its_children() -> None:
    environment = {"PYTHONPATH": ":/a::/b:", "OTHER": "1"}
    start_safely(environment)
    assert environment == {"PYTHONPATH": "/a:/b".replace(":", os.pathsep), "OTHER": "1", "PYTHONSAFEPATH": "1"}
    for path, left in {"": {}, ":": {}, "/a:": {"PYTHONPATH": "/a"}, ":/nowhere": {"PYTHONPATH": "/nowhere"}}.items():
        assert with_safe_path({"PYTHONPATH": path}) == {"PYTHONSAFEPATH": "1"} | left


def test_every_python_is_started_in_the_safe_mode() -> None:
    """Wherever a list begins with `sys.executable`, -P follows (or -I, which includes it)."""
    unsafe = [
        f"{path}:{node.lineno}"
        for path in _sources()
        for node in _nodes(path)
        if isinstance(node, ast.List | ast.Tuple) and node.elts and _named(node.elts[0]) == "sys.executable"
        and (len(node.elts) == 1 or _named(node.elts[1]) not in ("'-P'", "'-I'"))
    ]  # fmt: skip
    assert not unsafe


def _named(node: ast.AST) -> str:
    """A name or a constant as it is written; empty for all else, which is no program and no option."""
    return ast.unparse(node) if isinstance(node, ast.Attribute | ast.Constant) else ""
