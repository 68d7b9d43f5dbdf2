"""Disks that fill up or refuse: what is there stays, and a run goes on or stops, as configured."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import NamedTuple

import pytest

from regen_dist.checkpoint.export import model_shapes
from regen_dist.checkpoint.folder import CheckpointFolder
from regen_dist.config import load_config, to_yaml
from regen_dist.observe.record import read_record
from tests.fault.conftest import STEPS, losses
from tests.helpers.checkpoints import saved_run
from tests.helpers.datasets import write_sources
from tests.helpers.machine import fill, make_read_only, small_disk
from tests.helpers.ranks import Started, run_regen_alone, run_regen_ranks, said, start_regen_ranks
from tests.helpers.tiny import tiny_dataset, tiny_run

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


# Commands on disks that refuse: a line and an exit code; training goes on where only its record cannot be written.


COMMANDS: dict[str, list[str]] = {
    "export": ["checkpoint", "export", "RUN", "--out", "DISK/out", "--no-statistics"],
    "pin": ["checkpoint", "pin", "DISK/tiny", "4"],
    "build": ["shards", "build", "SOURCES", "--out", "DISK/out", "--workers", "0"],
    "synthetic": ["shards", "synthetic", "--out", "DISK/out", "--number", "2", "--seed", "1", "--split", "train"],
    "submit": ["submit", "run", "job", "--output", "DISK/out", "--force", "--", "config", "show", "CONFIG"],
    "submit train": ["submit", "train", "CONFIG", "output=DISK/out", "--force"],
    "train": ["train", "CONFIG", "output=DISK/out"],
}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What stands for the words in capitals."""
    folder = tmp_path_factory.mktemp("given")
    run = saved_run(folder)
    config = folder / "tiny.yaml"
    config.write_text(to_yaml(tiny_run(folder / "runs", tiny_dataset(folder / "data"), train__steps=6)))
    return {"RUN": str(run.folder), "CONFIG": str(config), "SOURCES": str(write_sources(folder / "sources"))}


@pytest.mark.parametrize("refuse", [make_read_only, fill])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_one_line(
    given: dict[str, str], name: str, refuse: Callable[[Path], object], tmp_path: Path
) -> None:
    """With the place in it, and no traceback."""
    with small_disk(tmp_path / "disk", "8m") as disk:
        shutil.copytree(given["RUN"], disk / "tiny")
        refuse(disk)
        words = given | {"DISK": str(disk)}
        arguments = COMMANDS[name]
        for word, value in words.items():
            arguments = [each.replace(word, value) for each in arguments]
        code = run_regen_alone(*arguments, logs=tmp_path)
    said = (tmp_path / "rank_0.log").read_text()
    assert code in (2, 3, 4), said
    assert "Traceback" not in said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, said
    assert str(disk) in errors[0]


def test_training_outlives_the_disk_of_its_run_folder(given: dict[str, str], tmp_path: Path) -> None:
    """A run that saves elsewhere is resumed on a full disk: it ends with 0, and warns of each file once."""
    with small_disk(tmp_path / "disk", "2m") as disk:
        places = [f"output={disk}", f"checkpoint.url={tmp_path / 'checkpoints'}"]
        train = ["train", given["CONFIG"], *places]
        assert run_regen_alone(*train, "train.steps=2", logs=tmp_path) == 0
        (disk / "tiny" / "claims" / "room").write_bytes(bytes(4096))
        ballast = fill(disk)
        (disk / "tiny" / "claims" / "room").unlink()  # for the claim alone
        (tmp_path / "rank_0.log").unlink()
        code = run_regen_alone(*train, "train.validate_every=3", logs=tmp_path)
        said = (tmp_path / "rank_0.log").read_text()
        assert code == 0, said
        assert "Traceback" not in said
        assert said.count("metrics.jsonl cannot be written") == 1
        assert "lines of" in said
        ballast.unlink()
        assert [line["step"] for line in read_record(disk / "tiny" / "metrics.jsonl", "train")][:2] == [1, 2]
