"""A disk that fills up while a run saves: what is there stays, and the run goes on or stops, as configured."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import NamedTuple

import pytest

from regen_dist.checkpoint.export import model_shapes
from regen_dist.checkpoint.folder import CheckpointFolder
from regen_dist.config import load_config
from regen_dist.observe.record import read_record
from tests.fault.conftest import STEPS, losses
from tests.helpers.commands import run_regen_ranks, said, start_regen_ranks
from tests.helpers.disks import small_disk
from tests.helpers.ranks import Started

EVERY = 2
FULL = "the checkpoint of step 6 was not saved: "  # two are kept, and there is no room for a third


class Disk(NamedTuple):
    """A disk with room for four checkpoints, less `ballast`: for two, and half of a third."""

    path: Path
    ballast: Path
    checkpoint_bytes: int

    def run(self, name: str) -> CheckpointFolder:
        """The checkpoints of a run."""
        return CheckpointFolder(self.path / name)


@pytest.fixture
def disk(tmp_path: Path, config: Path) -> Iterator[Disk]:
    size = 4 * 4 * sum(prod(shape) for shape in model_shapes(load_config(config, []).model).values())
    with small_disk(tmp_path / "disk", str(4 * size)) as path:
        ballast = path / "ballast"
        ballast.write_bytes(bytes(size * 3 // 2))
        yield Disk(path, ballast, size)


def _command(config: Path, disk: Disk, name: str, policy: str) -> list[object]:
    changes = [f"name={name}", f"checkpoint.url={disk.path}", f"checkpoint.every={EVERY}"]
    return ["train", config, *changes, f"checkpoint.on_failure={policy}"]


def _wait_for(words: str, logs: Path, ranks: Started) -> None:
    deadline = time.monotonic() + 120.0
    while words not in said(logs)[0]:
        assert len(ranks.running) == 2, f"it ended before it said {words!r}"
        assert time.monotonic() < deadline, f"it did not say {words!r}"
        time.sleep(0.02)


def _assert_whole(folder: CheckpointFolder, steps: list[int]) -> None:
    assert folder.steps() == steps
    assert [folder.problems(folder.manifest(step), checksums=True) for step in steps] == [[]] * len(steps)


def test_training_goes_on_and_saves_again_when_there_is_room(
    config: Path, undisturbed: list[float], disk: Disk, tmp_path: Path
) -> None:
    """Each failure is said once by each rank and recorded; the checkpoints from before it are whole; later ones
    succeed; and nothing of it shows in what was trained."""
    run, logs = config.parent / "runs" / "goes_on", tmp_path / "logs"
    with start_regen_ranks(*_command(config, disk, "goes_on", "continue"), logs=logs) as ranks:
        _wait_for(FULL, logs, ranks)
        _assert_whole(disk.run("goes_on"), [2, 4])
        disk.ballast.unlink()
        assert ranks.results() == [0, 0]
    _assert_whole(disk.run("goes_on"), [STEPS - EVERY, STEPS])
    assert disk.run("goes_on").debris() == {}
    saves = {line["step"]: line["problem"] for line in read_record(run / "metrics.jsonl", "checkpoint")}
    assert list(saves) == list(range(EVERY, STEPS + 1, EVERY))
    failed = [step for step, problem in saves.items() if problem]
    assert failed == list(range(6, failed[-1] + 1, EVERY))
    assert all(f"the disk of {disk.path}" in saves[step] for step in failed)
    for text in said(logs):
        assert [text.count(f"the checkpoint of step {step} was not saved: ") for step in saves] == [
            int(step in failed) for step in saves
        ]
        assert text.count("Training goes on (checkpoint.on_failure=continue)") == len(failed)
    assert losses(run) == undisturbed


def test_the_run_stops_where_that_is_the_policy(config: Path, disk: Disk, tmp_path: Path) -> None:
    """Exit code 4, on both ranks with the disk's name; what was begun is cleared, so the space is there again."""
    logs = tmp_path / "logs"
    assert run_regen_ranks(*_command(config, disk, "stops", "stop"), logs=logs) == [4, 4]
    for text in said(logs):
        (error,) = [line for line in text.splitlines() if re.match(r"(rank \d: )?error: ", line)]
        assert FULL in error
        assert f"the disk of {disk.path}" in error
        assert "The older checkpoints in " in error
        assert "Traceback" not in text
    _assert_whole(disk.run("stops"), [2, 4])
    assert disk.run("stops").debris() == {}
    used = shutil.disk_usage(disk.path).used
    assert used - disk.ballast.stat().st_size < 2.2 * disk.checkpoint_bytes
