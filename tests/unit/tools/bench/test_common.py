"""Comparison of records, worse, better and noise; and `regen bench all`, which compares published ones."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from regen_dist.errors import ConfigError, DataError, RegenError, TrainingError
from tools import stages
from tools.bench.common import ChangeKind, Figure, changes, only_one, split_arguments, table
from tools.bench.everything import SpeedBench, declared
from tools.cli import app


def _speeds(facts: Mapping[str, Any]) -> Iterator[Figure]:
    yield Figure("clips/s", facts["rate"], True, noise=0.1)
    yield Figure("bytes", facts["bytes"], False, noise=0.0)
    if "more" in facts:
        yield Figure("more", facts["more"], True)


DECLARED = {"reading": _speeds, "other": _speeds}


def _verdicts(old: dict[str, float], new: dict[str, float]) -> dict[str, ChangeKind]:
    return {change.name: change.kind for change in changes({"reading": old}, {"reading": new}, DECLARED)}


@pytest.mark.parametrize(
    ("rate", "verdict"),
    [(89.0, ChangeKind.WORSE), (91.0, ChangeKind.SAME), (111.0, ChangeKind.SAME), (112.0, ChangeKind.BETTER)],
)
def test_a_rate_moves_by_more_than_its_noise(rate: float, verdict: ChangeKind) -> None:
    assert _verdicts({"rate": 100.0, "bytes": 5}, {"rate": rate, "bytes": 5})["clips/s"] == verdict


def test_fewer_bytes_are_better() -> None:
    for size, verdict in ((4, ChangeKind.BETTER), (5, ChangeKind.SAME), (6, ChangeKind.WORSE)):
        assert _verdicts({"rate": 1.0, "bytes": 5}, {"rate": 1.0, "bytes": size})["bytes"] == verdict


def test_a_figure_of_one_record_alone_is_told() -> None:
    found = _verdicts({"rate": 1.0, "bytes": 5}, {"rate": 1.0, "bytes": 5, "more": 1.0})
    assert found["more"] == ChangeKind.MISSING


def test_benches_of_one_record_alone_are_left_out() -> None:
    facts = {"rate": 1.0, "bytes": 5}
    assert {each.bench for each in changes({"reading": facts}, {"reading": facts, "other": facts}, DECLARED)} == {
        "reading"
    }


def test_what_got_worse_stands_first() -> None:
    found = changes({"reading": {"rate": 100.0, "bytes": 5}}, {"reading": {"rate": 120.0, "bytes": 6}}, DECLARED)
    lines = table(found).splitlines()
    assert lines[2] == "| reading | bytes | 5 | 6 | 1.2 | worse |"
    assert lines[3] == "| reading | clips/s | 100 | 120 | 1.2 | better |"


def test_records_without_a_bench_in_common_are_refused() -> None:
    with pytest.raises(DataError, match="no bench in common"):
        changes({"reading": {}}, {"other": {}}, DECLARED)


def test_a_record_of_another_shape_is_refused() -> None:
    with pytest.raises(DataError, match="'reading' is not of this version"):
        changes({"reading": {"rate": 1.0}}, {"reading": {"rate": 1.0, "bytes": 1}}, DECLARED)


# `regen bench all`: published records compared with themselves and with worse ones, and what it refuses.


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
        (["--new", records[0], "--compare", records[0], "--only", "t2v"], ConfigError, "leave out --only"),
        (["--compare", tmp_path / "none.json"], DataError, "cannot be read"),
        (["--compare", other], DataError, "no record of `regen bench all`"),
        (["--out", tmp_path / "out", "--", "--steps=1"], ConfigError, "name one with --only"),
    ):
        result = _all(*arguments)
        assert isinstance(result.exception, error), result.output
        assert why in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_a_bench_alone_leaves_those_of_others_in_the_record(
    records: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is compared alone: the others are not of this run."""
    record = json.loads(records[1].read_text())

    def ran(arguments: list[str], folder: Path, *_: Any) -> stages.StageExit:
        folder.mkdir(exist_ok=True)
        (folder / "t2v.json").write_text(json.dumps(record["t2v"]))
        return stages.StageExit(0, False)

    monkeypatch.setattr(stages, "run_until", ran)
    out = tmp_path / "out"
    out.mkdir()
    (out / "all.json").write_text(records[0].read_text())
    result = _all("--only", "t2v", "--out", out, "--compare", records[0])
    assert "as they were: checkpoint, data" in result.output
    assert "| checkpoint |" not in result.output
    assert json.loads((out / "all.json").read_text()) == record


def test_a_folder_belongs_to_one_process_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.bench.ablation.open_dataset", lambda url: None)
    with only_one(tmp_path):
        for arguments in (["ablation", f"--out={tmp_path}"], ["all", f"--out={tmp_path}"]):
            result = CliRunner().invoke(app, ["bench", *arguments])
            assert isinstance(result.exception, ConfigError)
            assert f"in use by process {os.getpid()} on " in str(result.exception)
        assert [path.name for path in tmp_path.iterdir()] == [".lock"], "nothing was begun"
    with only_one(tmp_path):
        pass


def test_the_config_may_be_left_out() -> None:
    default = Path("configs/bench/data.yaml")
    assert split_arguments(Path("a.b=c"), ["d=e"], default) == (default, ["a.b=c", "d=e"])
    assert split_arguments(Path("my.yaml"), ["d=e"], default) == (Path("my.yaml"), ["d=e"])


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["ablation", "data.url=absent"], "absent"),
        (["checkpoint", "--url", "absent://bucket"], "absent"),
        (["compression", "--tests", "absent"], "absent is no folder; give one with videos to --tests"),
        (["data", "nothing.at=1"], "nothing: unknown key"),
        (["step", "--against", "absent"], "give a checkout of this repository"),
    ],
)
def test_what_is_missing_is_refused_before_anything_is_made(
    arguments: list[str], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "run_until", lambda *_: pytest.fail("something ran"))
    result = CliRunner().invoke(app, ["bench", *arguments, "--out", str(tmp_path / "out")])
    assert isinstance(result.exception, RegenError), result.output
    assert why in str(result.exception)
    assert not list(tmp_path.rglob("arms"))
    assert not list(tmp_path.rglob("clips"))


@pytest.mark.parametrize("bench", ["ablation", "checkpoint", "compression", "t2v"])
def test_an_override_alone_is_one_of_the_default_config(bench: str) -> None:
    result = CliRunner().invoke(app, ["bench", bench, "nothing.at=1"])
    assert isinstance(result.exception, ConfigError)
    assert "nothing: unknown key" in str(result.exception)
