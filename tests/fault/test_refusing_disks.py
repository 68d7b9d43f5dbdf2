"""Commands on disks that refuse: a line and an exit code; training goes on where only its record cannot be written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from regen_dist.config import to_yaml
from regen_dist.observe.record import read_record
from tests.helpers.builds import write_sources
from tests.helpers.commands import run_regen_alone
from tests.helpers.disks import fill, make_read_only, small_disk
from tests.helpers.saved import saved_run
from tests.helpers.tiny import tiny_dataset, tiny_run

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
