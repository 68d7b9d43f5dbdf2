"""The live line of a run in the terminal; plain lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_EVERY_S = 10.0


class ProgressLine:
    """Step, loss, validation, clips/s, MFU, data wait, memory and ETA."""

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
        """Keep the newest validation PSNR, or loss, on the line."""
        texts = {"psnr_db": "val {:.2f} dB", "loss": "val {:.4f}"}
        self._validation = next((text.format(values[name]) for name, text in texts.items() if name in values), "")

    def say(self, text: str) -> None:
        """A line of its own."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._bar.stop()


def describe(step: int, total: int, values: Mapping[str, Any], validation: str = "") -> str:
    """The figures as one line; `validation` is what to say of the newest one."""
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
