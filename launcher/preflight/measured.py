"""What a run has measured of itself until now, from its own record."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from launcher.history import read_history
from launcher.job import LAUNCH
from regen_dist.config import AnyRunConfig
from regen_dist.observe.record import read_record

_NEWEST = 20


class Measured(NamedTuple):
    """High values of the newest figures.

    Args:
        step_s: of a step, by `ranks` ranks.
        save_s: of a save, from its beginning to its end; None before the first.
        save_bytes: of a checkpoint; None before the first.
        start_s: from the beginning of a start of the job to its first step; None where it is not known.
        ranks: of the newest start.
    """

    step_s: float
    save_s: float | None
    save_bytes: int | None
    start_s: float | None
    ranks: int


def measured(config: AnyRunConfig) -> Measured | None:
    """Of a run; None before it has made steps."""
    path = config.folder / "metrics.jsonl"
    lines = read_record(path) if path.is_file() else []
    steps = _steps(lines)
    if not steps:
        return None
    saves = [line for line in lines if line["kind"] == "checkpoint" and not line["problem"]][-_NEWEST:]
    return Measured(
        step_s=max(steps[-_NEWEST:]),
        save_s=max((line["seconds"] for line in saves), default=None),
        save_bytes=saves[-1]["bytes"] if saves else None,
        start_s=_start_s(config.folder, lines),
        ranks=next((line["world_size"] for line in reversed(lines) if _is_start(line)), 1),
    )


def _steps(lines: Sequence[dict[str, Any]]) -> list[float]:
    """Seconds of a step at each log line. The first after a start warms up: it is left out where there are others."""
    warming: list[float] = []
    steady: list[float] = []
    first = True
    for line in lines:
        if line["kind"] == "train":
            (warming if first else steady).append(line["step_s"])
            first = False
        first = first or _is_start(line)
    return steady or warming


def _is_start(line: dict[str, Any]) -> bool:
    return bool(line["kind"] == "event" and line.get("event") == "start")


def _start_s(folder: Path, lines: Sequence[dict[str, Any]]) -> float | None:
    history = read_history(folder / LAUNCH)
    if not history:
        return None
    began = history[-1].start.time
    return next((line["time"] - began for line in lines if _is_start(line) and line["time"] >= began), None)
