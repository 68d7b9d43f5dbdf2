"""Commands side by side: all run, failures are named together, each has its log."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from launcher.arms import run_side_by_side
from regen_dist.errors import TrainingError


def _python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_every_command_runs_with_its_share_of_the_cores_and_its_own_log(tmp_path: Path) -> None:
    done: list[str] = []
    show = "import os; print('threads', os.environ['OMP_NUM_THREADS'])"
    run_side_by_side({"a": _python(show), "b": _python(show)}, logs=tmp_path / "logs", at_once=2, done=done.append)
    assert sorted(done) == ["a", "b"]
    for name in ("a", "b"):
        assert (tmp_path / "logs" / f"{name}.log").read_text().startswith("threads ")


def test_a_failure_is_named_after_the_others_have_run(tmp_path: Path) -> None:
    commands = {"bad": _python("raise SystemExit(7)"), "good": _python(f"open({str(tmp_path / 'ran')!r}, 'w')")}
    with pytest.raises(TrainingError, match=r"1 of 2 runs failed: bad \(exit code 7"):
        run_side_by_side(commands, logs=tmp_path, at_once=1)
    assert (tmp_path / "ran").exists()
