"""The record on disk: every step once, whatever happened in between."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from regen_dist.observe.record import Record, read_record
from tests.helpers.machine import fill, make_read_only, small_disk


def _write(path: Path, resumed: int, steps: range) -> None:
    record = Record(path, resumed)
    record.write("event", resumed, {"event": "start"})
    for step in steps:
        record.write("train", step, {"loss": step / 3})
    record.close()


def test_lines_are_json_and_read_back_bit_for_bit(tmp_path: Path) -> None:
    """One object a line, with kind, step and time; floats keep all their bits."""
    path = tmp_path / "run" / "metrics.jsonl"
    _write(path, 0, range(1, 4))
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["event", "train", "train", "train"]
    assert all(line["time"] > 1.5e9 for line in lines)
    assert [line["loss"] for line in read_record(path, "train")] == [1 / 3, 2 / 3, 1.0]


def test_steps_that_are_done_again_stand_there_once(tmp_path: Path) -> None:
    """Resumed at step 3 of 5: steps 4 and 5 of the first start go, the events of both starts stay."""
    path = tmp_path / "metrics.jsonl"
    _write(path, 0, range(1, 6))
    _write(path, 3, range(4, 7))
    assert [line["step"] for line in read_record(path, "train")] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in read_record(path, "event")] == [0, 3]


def test_a_cut_last_line_does_no_harm(tmp_path: Path) -> None:
    """A crash in the middle of a line: the others are read, and the next start writes on a line of its own."""
    path = tmp_path / "metrics.jsonl"
    _write(path, 0, range(1, 4))
    path.write_bytes(path.read_bytes()[:-12])
    assert [line["step"] for line in read_record(path, "train")] == [1, 2]
    _write(path, 2, range(3, 5))
    assert [line["step"] for line in read_record(path, "train")] == [1, 2, 3, 4]
    assert len(path.read_text().splitlines()) == 6


def test_a_line_is_on_disk_at_once(tmp_path: Path) -> None:
    """What was written is seen by a reader before the record is closed: a killed run keeps its lines."""
    record = Record(tmp_path / "metrics.jsonl", 0)
    record.write("train", 1, {"loss": float("nan")})
    (line,) = read_record(tmp_path / "metrics.jsonl")
    assert math.isnan(line["loss"])
    record.close()


def test_what_is_not_finite_is_null_in_the_file_and_nan_when_read(tmp_path: Path) -> None:
    record = Record(tmp_path / "metrics.jsonl", 0)
    record.write("train", 1, {"loss": math.nan, "grad_norm": math.inf})
    record.write("checkpoint", 1, {"problem": None})
    record.close()
    assert "NaN" not in (text := (tmp_path / "metrics.jsonl").read_text())
    assert "Infinity" not in text
    train, save = read_record(tmp_path / "metrics.jsonl")
    assert math.isnan(train["loss"])
    assert math.isnan(train["grad_norm"])
    assert save["problem"] is None


def test_a_full_disk_ends_nothing_and_lines_come_when_there_is_room(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No line is lost or cut in two, the order stays, and one warning is all."""
    monkeypatch.setattr("regen_dist.observe.record._RETRY_S", 0.0)
    with small_disk(tmp_path / "disk", "64k") as disk:
        path = disk / "run" / "metrics.jsonl"
        record = Record(path, 0)
        record.write("train", 1, {"loss": 0.5})
        ballast = fill(disk)
        for step in range(2, 200):
            record.write("train", step, {"loss": step / 3, "pad": "x" * 100})
        assert len(read_record(path)) < 100
        assert path.read_bytes().endswith(b"}\n")
        ballast.unlink()
        record.write("train", 200, {"loss": 0.25})
        assert [line["step"] for line in read_record(path)] == list(range(1, 201))
        assert path.read_text().count("\n") == 200
        record.close()
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"warning: {path} cannot be written" in said
    assert "No space left on device" in said


def test_lines_that_were_never_written_are_counted_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder that takes none from the beginning: going back drops what waits of later steps."""
    with small_disk(tmp_path / "disk", "64k") as disk:
        make_read_only(disk)
        record = Record(disk / "run" / "metrics.jsonl", 0)
        for step in range(1, 6):
            record.write("train", step, {"loss": 0.5})
        record.rewind(3)
        record.close()
    first, last = capsys.readouterr().err.splitlines()
    assert "Read-only file system" in first
    assert last.startswith("warning: 3 lines of ")


def test_a_resume_on_a_full_disk_keeps_the_record_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no room for a second copy without the lines that go: they go when there is."""
    monkeypatch.setattr("regen_dist.observe.record._RETRY_S", 0.0)
    with small_disk(tmp_path / "disk", "64k") as disk:
        path = disk / "metrics.jsonl"
        _write(path, 0, range(1, 6))
        ballast = fill(disk)
        record = Record(path, 3)
        record.write("train", 4, {"loss": 0.125})
        assert [line["step"] for line in read_record(path, "train")] == [1, 2, 3, 4, 5]
        ballast.unlink()
        record.close()
        assert [line["loss"] for line in read_record(path, "train")] == [1 / 3, 2 / 3, 1.0, 0.125]
