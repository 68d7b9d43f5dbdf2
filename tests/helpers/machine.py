"""Facts of the machine under a test: processes, small disks, a clean Python, and the meta device in place of a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from regen_dist.distributed.ranks import Ranks


def descendants(process_id: int) -> list[int]:
    """Every process that it started, and that those started, as far as they still run."""
    found: list[int] = []
    for children in Path(f"/proc/{process_id}/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):  # the thread or the process has ended meanwhile
            found += map(int, children.read_text().split())
    return [*found, *(each for child in found for each in descendants(child))]


def runs(process_id: int) -> bool:
    """Whether a process is there, and not merely waiting to be reaped."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_gone(process_ids: Sequence[int], timeout_s: float = 20.0) -> None:
    """Block until none of them runs; fails when one does for longer.

    A process that got SIGKILL still runs for a moment: a test waits, it never asks at once.
    """
    deadline = time.monotonic() + timeout_s
    while left := [process_id for process_id in process_ids if runs(process_id)]:
        assert time.monotonic() < deadline, f"{left} still run after {timeout_s:.0f} s"
        time.sleep(0.02)


# Small disks for tests.


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A disk of `size` ("200k") at `folder` while the block lasts; skips the test where none can be mounted."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def make_read_only(disk: Path) -> None:
    """Let a disk of `small_disk` take nothing more. No file on it may be open for writing."""
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)


def fill(disk: Path) -> Path:
    """Leave no byte free on a disk; returns the file that takes the room, which may be deleted."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (2**16, 2**12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    return ballast


# A Python that has what users of diffusers have, and nothing of this project.


OURS = ("regen_dist", "regen-dist", "__editable__", "launcher", "tools", "tests", "pydantic", "deepspeed", "omegaconf")
_CHECK = """
import importlib.util, sys
for name in ("regen_dist", "launcher", "pydantic", "deepspeed", "omegaconf"):
    assert importlib.util.find_spec(name) is None, name + " can be imported here"
"""


def clean_python(folder: Path) -> Path:
    """The interpreter of a new virtual environment with links to every installed package but ours, and those that only
    we need."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = (folder / "lib").glob("python*/site-packages")
    for place in map(Path, sys.path):
        if place.name not in ("site-packages", "dist-packages") or not place.is_dir():
            continue
        for entry in place.iterdir():
            link = site / entry.name
            if entry.suffix != ".pth" and not entry.name.startswith(OURS) and not os.path.lexists(link):
                link.symlink_to(entry)
    return folder / "bin" / "python"


def run_clean(python: Path, code: str, *arguments: object, home: Path) -> dict[str, object]:
    """Run a script there, without a network, after checking that nothing of ours can be imported; what its last line
    says in JSON."""
    hidden = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    environment = hidden | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(python), "-I", "-c", _CHECK + code, *map(str, arguments)], env=environment, cwd=home, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found | {"stderr": done.stderr}


# The meta device in the place of a GPU: operations that mix its tensors with the CPU's raise, as they do on a GPU.


META = torch.device("meta")


@dataclass(frozen=True)
class MetaRanks(Ranks):
    """One rank, whose device is the meta device."""

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return META


class Answers(TorchDispatchMode):
    """Gives a number where the host asks a tensor of the meta device for one, which has none: 0.5, or False. Counts the
    questions: each makes the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            self.asked += 1
            return False if args[0].dtype == torch.bool else 0.5
        return function(*args, **(kwargs or {}))
