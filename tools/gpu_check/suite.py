"""Tests marked `cuda`, run by pytest."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from typing import Any

from regen_dist.errors import RegenError
from regen_dist.programs import python
from tools.gpu_check.machine import Machine, PartLeftOut

_ROOT = Path(__file__).parents[2]


def tests(machine: Machine) -> dict[str, Any]:
    """Run them. Without a GPU all of them are skipped, which shows that they can be collected."""
    folder = _ROOT / "tests" / "cuda"
    if not folder.is_dir():
        raise PartLeftOut("needs a checkout of the repository: the package carries no tests")
    if importlib.util.find_spec("pytest") is None:
        raise PartLeftOut("needs pytest: pip install -e '.[dev]'")
    command = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "cuda", str(folder))
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr, flush=True)
    last = (done.stdout.strip().splitlines() or ["no output"])[-1].strip("= ")
    if done.returncode:
        raise RegenError(f"pytest ended with exit code {done.returncode}: {last}")
    if machine.is_cuda and "passed" not in last:
        raise RegenError(f"no test ran: {last}")
    return {"summary": last}
