"""The record on disk, every step once whatever happened in between, and the progress line of the terminal."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console

from regen_dist.observe.hardware import memory_bytes, peak_tflops
from regen_dist.observe.record import ProgressLine, Record, describe, read_record
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


# What the terminal shows of a run.


VALUES = {"loss": 0.12345, "clips_per_s": 12.34, "mfu": 0.256, "data_wait": 0.031, "memory_bytes": 3 * 2**29}
LINE = "step 40/1000  loss 0.1235  val 21.37 dB  12.3 clips/s  MFU 25.6%  data wait 3.1%  1.50 GiB"


def test_the_line() -> None:
    """Step, loss, validation PSNR once there is one, clips/s, MFU, data wait, memory."""
    assert describe(40, 1000, VALUES, "val 21.37 dB") == LINE
    assert "dB" not in describe(40, 1000, VALUES)


def _console(terminal: bool) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=terminal, width=200), file


def test_without_a_terminal_plain_lines_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """A log file gets no control codes: a line at first, then every ten seconds, and always the last one, with ETA."""
    now = [1000.0]
    monkeypatch.setattr("regen_dist.observe.record.time.monotonic", lambda: now[0])
    console, file = _console(terminal=False)
    line = ProgressLine(1000, 0, console)
    line.validation({"psnr_db": 21.374})
    for step in range(10, 1001, 10):
        now[0] += 1.0
        line.train(step, VALUES)
    line.message("left out: [new]/a[/b].mp4")
    line.message("done")
    line.close()
    shown = [text for text in file.getvalue().splitlines() if text.strip()]
    assert "\x1b" not in file.getvalue()
    steps = [int(text.split("/")[0].removeprefix("step ")) for text in shown if text.startswith("step")]
    assert steps == [10, *range(120, 1000, 110), 1000]
    assert shown[0].startswith(LINE.replace("40/1000", "10/1000"))
    assert shown[0].endswith("eta 1.6 min")
    assert shown[-3].endswith("eta 0.0 min")
    assert shown[-2:] == ["left out: [new]/a[/b].mp4", "done"]


def test_the_time_left_after_a_rollback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that were made before it are no measure of those that are left."""
    now = [1000.0]
    monkeypatch.setattr("regen_dist.observe.record.time.monotonic", lambda: now[0])
    console, file = _console(terminal=False)
    line = ProgressLine(1000, 500, console)
    now[0] += 600.0
    line.rewind(400)
    now[0] += 60.0
    line.train(460, VALUES)
    assert file.getvalue().endswith("eta 9.0 min\n")


def test_on_a_terminal_the_line_is_live() -> None:
    """The same figures, drawn in place."""
    console, file = _console(terminal=True)
    line = ProgressLine(1000, 0, console)
    line.train(40, VALUES)
    line.close()
    assert "clips/s" in file.getvalue()


def test_hardware_figures_are_plausible() -> None:
    """A measured CPU peak between a thousandth of and ten TFLOP/s; memory of a process with torch in it."""
    assert 1e-3 < peak_tflops(torch.device("cpu"), torch.float32, seconds=0.05) < 10
    assert 50e6 < memory_bytes(torch.device("cpu")) < 100e9
