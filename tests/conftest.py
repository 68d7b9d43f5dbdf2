"""Settings and fixtures for every suite. A test's folder gives its marker; pyproject.toml says what each means."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_MARKED = ("dist", "fault", "cluster", "e2e", "cuda")

# Bytecode is kept even where the environment forbids it, as many images do: else every worker rewrites the assertions
# of all tests, and each of hundreds of processes compiles the library.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Before anything imports torch: several workers share few cores, and the ranks share one folder of compiled operators.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".cache" / "torch_extensions"))
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault(
    "REGEN_CACHE", str(ROOT / ".cache" / "tests")
)  # what tests compile is not left in the home folder

# What is imported and collected stays to the end: a full collection that goes through it finds nothing, and takes a
# quarter of a second each time. 10,000 is the command's own threshold (tools/cli.py).
gc.set_threshold(10_000)

# `&` starts a command with Ctrl-C ignored, `nohup` with SIGHUP, and what they start inherits it: tests send both.
if threading.current_thread() is threading.main_thread():
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        suite = item.path.relative_to(ROOT / "tests").parts[0]
        if suite in _MARKED:
            item.add_marker(suite)


def pytest_collection_finish() -> None:
    gc.freeze()


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT
