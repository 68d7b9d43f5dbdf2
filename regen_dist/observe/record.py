"""The record of a run: `metrics.jsonl`, one JSON object a line, in the order of the steps."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from regen_dist.jsontext import json_text

Kind = Literal["train", "validation", "event", "gradients", "checkpoint", "samples", "bad_sample"]
_FIGURES = ("train", "validation", "gradients")  # kinds of lines whose values are numbers


class Record:
    """Appends lines; on resuming it first drops those of steps that will be done again, so that every step stands in it
    once."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._drop_after(resumed_step)
        self._file = path.open("a", encoding="utf-8", buffering=1)  # closed by close()

    def write(self, kind: Kind, step: int, values: Mapping[str, Any]) -> None:
        """One line. Floats are written so that they read back bit for bit."""
        self._file.write(json_text({"kind": kind, "step": step, **values, "time": time.time()}) + "\n")

    def close(self) -> None:
        self._file.close()

    def _drop_after(self, step: int) -> None:
        kept = [line for line in read_record(self._path) if line["kind"] == "event" or line["step"] <= step]
        temporary = self._path.with_suffix(".jsonl.tmp")
        temporary.write_text("".join(json_text(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, self._path)


def read_record(path: Path, kind: Kind | None = None) -> list[dict[str, Any]]:
    """The lines of a record; a last line that a crash cut short is left out. A figure that is null was not finite: it
    is given as NaN."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if line["kind"] in _FIGURES:
            line = {name: math.nan if value is None else value for name, value in line.items()}
        if kind is None or line["kind"] == kind:
            lines.append(line)
    return lines
