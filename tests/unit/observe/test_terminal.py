"""A run in the terminal: the progress line, live or as plain lines."""

from __future__ import annotations

import io
import os
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from regen_dist.observe.terminal import ProgressLine, describe
from regen_dist.programs import python

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
    monkeypatch.setattr("regen_dist.observe.terminal.time.monotonic", lambda: now[0])
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
    monkeypatch.setattr("regen_dist.observe.terminal.time.monotonic", lambda: now[0])
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


_PRINTS = """
from regen_dist.observe.terminal import ProgressLine, shield_streams, warn
shield_streams()
print("out")
warn("a warning")
ProgressLine(10, 0).message("a message")
open({mark!r}, "w").close()
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("closed", [False, True])
def test_streams_without_room_or_reader_end_no_run(tmp_path: Path, closed: bool, unbuffered: str) -> None:
    """A full disk, and a pipe whose reader has ended, as `| tee LOG` after Ctrl-C; buffered or as ranks are."""
    mark = tmp_path / "mark"
    if closed:
        reader, output = os.pipe()
        os.close(reader)
    else:
        output = os.open("/dev/full", os.O_WRONLY)
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    command = python("-c", _PRINTS.format(mark=str(mark)))
    with os.fdopen(output, "wb") as file:
        assert subprocess.run(command, env=environment, stdout=file, stderr=file, check=False).returncode == 0
    assert mark.exists()
