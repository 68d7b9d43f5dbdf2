"""A run in the terminal: its progress line, warnings, and standard streams that survive full disks and closed pipes."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TextIO, cast

if TYPE_CHECKING:
    from rich.console import Console
    from typing_extensions import Buffer

PLAIN_EVERY_S = 10.0


class ProgressLine:
    """Progress line of a run in the terminal, or plain lines without one: step, loss, validation, clips/s, MFU, data
    wait, memory and ETA."""

    def __init__(self, total_steps: int, start: int, console: Console | None = None) -> None:
        from rich.console import Console  # later than every command's start, which imports this module
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

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


# Standard streams that survive a full disk, and a reader that ended (Ctrl-C ends `| tee LOG` at once): the log loses
# lines, but the run does not end; and user warnings.


class _Lossy(io.FileIO):
    """File that drops bytes while its disk refuses them, or once nobody reads its pipe."""

    def write(self, data: Buffer, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def shield_stderr() -> None:
    """Make stderr of this process lossy: warnings that nobody reads end no command."""
    sys.stderr = _shielded(sys.stderr)


def shield_streams() -> None:
    """Make stdout and stderr of this process lossy. Call it once, at the start of a long-running process."""
    sys.stdout = _shielded(sys.stdout)
    shield_stderr()


def _shielded(stream: TextIO) -> TextIO:
    """Return the stream on top of a lossy file; unchanged if it has no file descriptor of its own."""
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    unbuffered = isinstance(stream.buffer, io.FileIO)  # by PYTHONUNBUFFERED, which every rank has
    if not unbuffered and not isinstance(getattr(stream.buffer, "raw", None), io.FileIO):
        return stream
    with suppress(OSError):
        stream.flush()
    raw = _Lossy(stream.fileno(), "w", closefd=False)
    shielded = io.TextIOWrapper(
        raw if unbuffered else io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering or stream is sys.stderr,
        write_through=stream.write_through,
    )
    return cast("TextIO", shielded)


def warn(text: str) -> None:
    """Print a warning for the user on stderr, one line, unbuffered."""
    print(f"warning: {text}", file=sys.stderr, flush=True)
