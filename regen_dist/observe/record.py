"""Metrics record of a run: `metrics.jsonl`, one JSON object a line, in the order of the steps; the progress line;
and standard streams that survive a full disk."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from regen_dist.config.files import write_text_atomically
from regen_dist.jsontext import json_text

if TYPE_CHECKING:
    from typing_extensions import Buffer

Kind = Literal["train", "validation", "event", "gradients", "checkpoint", "samples", "bad_sample"]
_FIGURES = ("train", "validation", "gradients")  # kinds of lines with numeric values
_RETRY_S = 5.0
_MOST_WAITING_BYTES = 2**24


class Record:
    """Append-only metrics record. On resuming, lines of steps that will be repeated are dropped, so that every step
    appears once.

    A failing disk does not end the run: up to 16 MiB of lines wait in memory until it accepts writes again. There is a
    warning at the first failure, and one at the end if lines were lost.
    """

    def __init__(self, path: Path, resumed_step: int) -> None:
        self._path, self._step = path, resumed_step
        self._file: int | None = None  # closed by close()
        self._waiting = b""  # whole lines
        self._lost, self._warned, self._retry_at = 0, False, 0.0
        self._flush()

    def write(self, kind: Kind, step: int, values: Mapping[str, Any]) -> None:
        """Append a line. Floats are written so that they read back bit for bit."""
        line = (json_text({"kind": kind, "step": step, **values, "time": time.time()}) + "\n").encode()
        if len(self._waiting) + len(line) > _MOST_WAITING_BYTES:
            self._lost += 1
        else:
            self._waiting += line
        if time.monotonic() >= self._retry_at:
            self._flush()

    def rewind(self, step: int) -> None:
        """Drop the lines of steps after `step`."""
        self._close_file()
        self._step = step
        self._waiting = b"".join(
            each for each in self._waiting.splitlines(keepends=True) if _survives_rewind(json.loads(each), step)
        )
        self._flush()

    def close(self) -> None:
        """Write the waiting lines and close the file."""
        self._flush()
        self._close_file()
        lost = self._lost + self._waiting.count(b"\n")
        if lost:
            _warn(f"{lost} lines of {self._path} were lost because they could not be written")

    def _flush(self) -> None:
        try:
            if self._file is None:
                self._file = self._open()
            while self._waiting:
                self._waiting = self._waiting[self._append() :]
        except OSError as error:
            self._retry_at = time.monotonic() + _RETRY_S
            if not self._warned:
                self._warned = True
                _warn(f"{self._path} cannot be written, lines wait in memory and the run continues: {error.strerror}")

    def _open(self) -> int:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            self._drop_after(self._step)
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def _append(self) -> int:
        """Write waiting lines and return the bytes of complete ones. A partial line is removed."""
        assert self._file is not None, "opened by _flush"
        before = os.fstat(self._file).st_size
        written = os.write(self._file, self._waiting)
        whole = self._waiting.rfind(b"\n", 0, written) + 1
        if whole < written:
            os.ftruncate(self._file, before + whole)
        if not whole:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        return whole

    def _close_file(self) -> None:
        if self._file is not None:
            try:
                os.close(self._file)
            except OSError as error:  # NFS reports a full disk here
                _warn(f"{self._path}: {error.strerror}; its last lines may be missing")
            self._file = None

    def _drop_after(self, step: int) -> None:
        kept = [line for line in read_record(self._path) if _survives_rewind(line, step)]
        text = "".join(json_text(line) + "\n" for line in kept)
        if text != self._path.read_text(encoding="utf-8", errors="replace"):  # rewriting needs space for a second copy
            write_text_atomically(self._path, text)


def read_record(path: Path, kind: Kind | None = None) -> list[dict[str, Any]]:
    """Read the lines of a record, without a last line that a crash cut short. Figures that are null were not finite and
    are returned as NaN."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if line["kind"] in _FIGURES:
            line = {name: math.nan if value is None else value for name, value in line.items()}
        if kind is None or line["kind"] == kind:
            lines.append(line)
    return lines


def _survives_rewind(line: Mapping[str, Any], step: int) -> bool:
    """Return true if a line stays valid when the run resumes from `step`."""
    return bool(line["kind"] == "event" or line["step"] <= step)


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


# --- progress line ---
PLAIN_EVERY_S = 10.0


class ProgressLine:
    """Progress line of a run in the terminal, or plain lines without one: step, loss, validation, clips/s, MFU, data
    wait, memory and ETA."""

    def __init__(self, total_steps: int, start: int, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._total, self._start, self._began, self._printed = total_steps, start, time.monotonic(), 0.0
        self._validation = ""
        self._bar = Progress(
            BarColumn(bar_width=20),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._task = self._bar.add_task("starting", total=total_steps, completed=start)
        if self._console.is_terminal:
            self._bar.start()

    def train(self, step: int, values: Mapping[str, Any]) -> None:
        """Show the newest figures of training."""
        line = describe(step, self._total, values, self._validation)
        self._bar.update(self._task, completed=step, description=line)
        now = time.monotonic()
        if not self._console.is_terminal and (now - self._printed > PLAIN_EVERY_S or step == self._total):
            self._printed = now
            eta = (now - self._began) / max(1, step - self._start) * (self._total - step)
            self._console.print(f"{line}  eta {eta / 60:.1f} min", highlight=False, soft_wrap=True)

    def validation(self, values: Mapping[str, Any]) -> None:
        """Show the newest validation PSNR, or loss, on the line."""
        texts = {"psnr_db": "val {:.2f} dB", "loss": "val {:.4f}"}
        self._validation = next((text.format(values[name]) for name, text in texts.items() if name in values), "")

    def rewind(self, step: int) -> None:
        """Count the time that is left from here on, after the run went back to `step`."""
        self._start, self._began = step, time.monotonic()
        self._bar.reset(self._task, completed=step, description="went back")

    def message(self, text: str) -> None:
        """Print a message on a line of its own."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        self._bar.stop()


def describe(step: int, total: int, values: Mapping[str, Any], validation: str = "") -> str:
    """Format the figures as one line; `validation` is the text for the newest validation."""
    parts = [f"step {step}/{total}", f"loss {values['loss']:.4f}"]
    if validation:
        parts.append(validation)
    parts += [
        f"{values['clips_per_s']:.1f} clips/s",
        f"MFU {values['mfu']:.1%}",
        f"data wait {values['data_wait']:.1%}",
        f"{values['memory_bytes'] / 2**30:.2f} GiB",
    ]
    return "  ".join(parts)


# Standard streams that survive a full disk: the log loses lines, but the run does not end; and user warnings.


class _Lossy(io.FileIO):
    """File that drops bytes while its disk refuses them. A broken pipe still raises."""

    def write(self, data: Buffer, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError:
            return memoryview(data).nbytes


def shield_streams() -> None:
    """Make stdout and stderr of this process lossy. Call it once, at the start of a long-running process."""
    sys.stdout, sys.stderr = _shielded(sys.stdout), _shielded(sys.stderr)


def _shielded(stream: TextIO) -> TextIO:
    """Return the stream on top of a lossy file; unchanged if it has no file descriptor of its own."""
    if not isinstance(stream, io.TextIOWrapper) or not isinstance(getattr(stream.buffer, "raw", None), io.FileIO):
        return stream
    stream.flush()
    raw = _Lossy(stream.fileno(), "w", closefd=False)
    shielded = io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering or stream is sys.stderr,
        write_through=stream.write_through,
    )
    return cast("TextIO", shielded)


def warn(text: str) -> None:
    """Print a warning for the user on stderr, one line, unbuffered."""
    print(f"warning: {text}", file=sys.stderr, flush=True)
