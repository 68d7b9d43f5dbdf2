"""`regen bench all`: published records compared with themselves and with worse ones, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from regen_dist.errors import ConfigError, DataError, TrainingError
from tools.bench.everything import SpeedBench, declared
from tools.cli import app

PUBLISHED = ["checkpoint", "data", "t2v"]


def _record(root: Path) -> dict[str, Any]:
    return {name: json.loads((root / f"docs/results/{name}/{name}.json").read_text()) for name in PUBLISHED}


def _all(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["bench", "all", *map(str, arguments)], env={"COLUMNS": "200"})


@pytest.fixture
def records(root: Path, tmp_path: Path) -> tuple[Path, Path]:
    """An old one, and one in which training from the cache has become half as fast."""
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    record = _record(root)
    old.write_text(json.dumps(record))
    record["t2v"]["training"]["by_cpu"]["the same batches, from memory"]["median"] /= 2
    new.write_text(json.dumps(record))
    return old, new


def test_every_bench_says_what_its_figures_are(root: Path) -> None:
    assert declared().keys() == {bench.value for bench in SpeedBench}
    for name, facts in _record(root).items():
        found = list(declared()[name](facts))
        assert len({figure.name for figure in found}) == len(found) > 2, name
        assert all(figure.value > 0 for figure in found), name


def test_a_record_is_as_good_as_itself(records: tuple[Path, Path]) -> None:
    result = _all("--compare", records[0], "--new", records[0], "--require")
    assert result.exit_code == 0
    assert "worse" not in result.output
    assert result.output.count("| t2v |") > 2


def test_what_got_worse_is_told_and_only_then_an_error_when_asked(records: tuple[Path, Path]) -> None:
    old, new = records
    told = _all("--compare", old, "--new", new)
    assert told.exit_code == 0
    assert sum(line.endswith("| worse |") for line in told.output.splitlines()) == 1
    required = _all("--compare", old, "--new", new, "--require")
    assert isinstance(required.exception, TrainingError)
    assert required.exception.exit_code == 6


def test_what_makes_no_sense_is_refused_before_anything_runs(records: tuple[Path, Path], tmp_path: Path) -> None:
    other = tmp_path / "step.json"
    other.write_text(json.dumps({"command": "regen bench step"}))
    for arguments, error, why in (
        (["--new", records[0]], ConfigError, "--compare OLD.json"),
        (["--compare", tmp_path / "none.json"], DataError, "cannot be read"),
        (["--compare", other], DataError, "no record of `regen bench all`"),
        (["--out", tmp_path / "out", "--", "--steps=1"], ConfigError, "name one with --only"),
    ):
        result = _all(*arguments)
        assert isinstance(result.exception, error), result.output
        assert why in str(result.exception)
    assert not (tmp_path / "out").exists()
