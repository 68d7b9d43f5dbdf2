"""The starts and ends of one task, as lines of `launch/starts.jsonl`. One process writes at a time: the batch script of
the job, or the process that stands for it on this machine."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import ValidationError

from regen_dist.config.section import Section

FILE = "starts.jsonl"
Why = Literal["done", "preempted", "time limit", "signal", "stopped", "failed", "node lost", "unknown"]


class Start(Section):
    """A start: which job, on which nodes, and from which step (None: not known, or no training)."""

    kind: Literal["start"] = "start"
    job: str
    restart: int
    nodes: tuple[str, ...]
    step: int | None = None
    time: float


class End(Section):
    """How the newest start ended, and what was made of it. `at_fault`: the nodes it failed on."""

    kind: Literal["end"] = "end"
    why: Why
    code: int
    text: str
    again: bool
    at_fault: tuple[str, ...] = ()
    time: float


class Attempt(NamedTuple):
    """A start and its end; None: it runs, or it was cut off before it could say anything."""

    start: Start
    end: End | None


def read_history(launch: Path) -> list[Attempt]:
    """Every start of a task, oldest first; lines that a crash cut short are left out."""
    attempts: list[Attempt] = []
    path = launch / FILE
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        entry = _parse(line)
        if isinstance(entry, Start):
            attempts.append(Attempt(entry, None))
        elif entry is not None and attempts:
            attempts[-1] = Attempt(attempts[-1].start, entry)
    return attempts


def _parse(line: str) -> Start | End | None:
    try:
        values = json.loads(line)
        return (Start if values["kind"] == "start" else End).model_validate(values)
    except (ValueError, KeyError, TypeError, ValidationError):
        return None


def write_entry(launch: Path, entry: Start | End) -> None:
    """Append a line, and sync it: the process may be killed right after."""
    launch.mkdir(parents=True, exist_ok=True)
    with (launch / FILE).open("ab") as file:
        # A line that was cut short must not swallow this one.
        file.write(b"" if _ends_well(launch / FILE) else b"\n")
        file.write(entry.model_dump_json().encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def set_aside(launch: Path, name: str) -> None:
    """Begin a new history; the old one is kept as `starts-NAME.jsonl`."""
    if (launch / FILE).is_file():
        os.replace(launch / FILE, launch / f"starts-{name}.jsonl")


def _ends_well(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def now() -> float:
    """Seconds since the epoch, as histories write them."""
    return round(time.time(), 3)
