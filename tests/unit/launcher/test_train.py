"""The launcher checks a config before it starts anything, and does so without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from launcher.supervise import train_locally
from regen_dist.errors import ConfigError


def _launcher(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launcher", *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )


def test_a_wrong_config_ends_with_code_2_before_any_rank_starts(root: Path) -> None:
    done = _launcher("train", "configs/embedder/nano.yaml", "--tasks-per-node", "2", "train.stepz=3", cwd=root)
    assert done.returncode == 2
    assert "train.stepz" in done.stderr
    assert "did you mean train.steps?" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_batch_that_cannot_be_divided_is_refused_with_what_fits(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"8 samples at a time, .* of 3 ranks; ranks that fit: 1, 2, 4, 8"):
        train_locally(root / "configs/embedder/nano.yaml", [], ranks=3)


def test_one_process_engine_refuses_more_ranks(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"engine\.kind=zero3"):
        train_locally(root / "configs/embedder/nano.yaml", ["engine.kind=plain"], ranks=2)


def test_the_launcher_imports_no_torch() -> None:
    code = "import sys, launcher.supervise, launcher.supervise, launcher.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
