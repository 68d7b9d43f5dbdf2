"""Starting `regen shards build` as users do, and looking at what it made."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from regen_dist.data.build.segments import BuildOptions
from regen_dist.data.storage.store import Store
from tests.helpers.video import moving_square, write_video

OPTIONS = BuildOptions(segment_seconds=1.5, short_side=48, crf=20, samples_per_shard=4, min_frames=20)
PARTS = replace(OPTIONS, part_gb=1e-6, samples_per_shard=2)  # every source is a part
FLAGS = ["--segment-seconds", "1.5", "--short-side", "48", "--crf", "20", "--min-frames", "20"]
FLAGS += ["--part-gb", "1e-6", "--samples-per-shard", "2"]


def write_sources(folder: Path) -> Path:
    """Three videos, one in a folder of its own: 10 segments of 36 frames and one of 24, with OPTIONS."""
    write_video(folder / "wide.mp4", moving_square(180, 64, 96, seed=1))
    write_video(folder / "tall.mp4", moving_square(108, 96, 64, seed=2))
    write_video(folder / "more" / "short one.mkv", moving_square(96, 64, 64, seed=3))
    return folder


def start_build(*arguments: str | Path) -> subprocess.Popen[str]:
    """The command, running; its output is kept."""
    command = [sys.executable, "-m", "tools.cli", "shards", "build", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run_builds(*commands: Sequence[str | Path]) -> list[str]:
    """Run commands side by side to their end; their output. Fails when one does."""
    processes = [start_build(*arguments) for arguments in commands]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs


def wait_for(store: Store, name: str, process: subprocess.Popen[str], seconds: float = 120) -> None:
    """Until an object is there; fails when the process has ended by then."""
    deadline = time.monotonic() + seconds
    while store.size(name) is None:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"{name} did not come"
        time.sleep(0.02)


def objects(url: str | Path) -> dict[str, bytes]:
    """Everything at a URL."""
    store = Store(url)
    return {name: store.get(name) for name in store.list()}
