"""Metrics record of a run: `metrics.jsonl`, one JSON object a line, in the order of the steps."""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from regen_dist.config.files import write_text_atomically
from regen_dist.jsontext import json_text
from regen_dist.observe.terminal import warn

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
        self._flush()
        self._close_file()
        lost = self._lost + self._waiting.count(b"\n")
        if lost:
            warn(f"{lost} lines of {self._path} were lost because they could not be written")

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
                warn(f"{self._path} cannot be written, lines wait in memory and the run continues: {error.strerror}")

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
                warn(f"{self._path}: {error.strerror}; its last lines may be missing")
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
