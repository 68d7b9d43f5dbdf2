"""How far a run is, from the ends of its files: a record may have gigabytes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from launcher.history import Attempt
from launcher.job import Task
from regen_dist.observe.heartbeat import Beat, beat_path, parse_beat, read_text

TAIL_BYTES, LONG_TAIL_BYTES = 64 * 2**10, 2**20
QUIET_S = 60.0  # heartbeats come every few seconds
_STANDS_S = 60.0  # longer than a step should take; what takes longer is named, and may be right
_SPEED_LINES = 50


class Figures(NamedTuple):
    """What the table shows of a training; None for what is not known."""

    step: int | None = None
    loss: float | None = None
    clips_per_s: float | None = None
    step_s: float | None = None  # with saves and validation, over the newest lines
    saved_step: int | None = None
    saved_age_s: float | None = None


def figures(task: Task, history: Sequence[Attempt]) -> Figures:
    """Of a training task.

    Args:
        history: all its starts.
    """
    lines = tail(task.folder / "metrics.jsonl")
    trained = [line for line in lines if line.get("kind") == "train"]
    last = trained[-1] if trained else {}
    started = history[-1].start if history else None
    now = [line for line in trained if started is None or line["time"] >= started.time]
    saved_step, saved_at = _saved(task, lines)
    known = [step for step in (last.get("step"), saved_step, started.step if started else None) if step is not None]
    return Figures(
        step=last.get("step") if now else max(known, default=None),
        loss=last.get("loss"),
        clips_per_s=now[-1].get("clips_per_s") if now else None,
        step_s=_pace(now[-_SPEED_LINES:]),
        saved_step=saved_step if saved_step is not None else (started.step or None if started else None),
        saved_age_s=None if saved_at is None else max(time.time() - saved_at, 0.0),
    )


def tail(path: Path, size: int = TAIL_BYTES) -> list[dict[str, Any]]:
    """The newest lines of a record, oldest first; empty where there is none."""
    return list(_parsed(read_end(path, size).splitlines()))


def read_end(path: Path, size: int) -> str:
    """The last `size` bytes of a file, without the line that this cuts; "" where there is no file."""
    try:
        with path.open("rb") as file:
            length = file.seek(0, os.SEEK_END)
            file.seek(max(length - size - 1, 0))
            found = file.read()
    except FileNotFoundError:
        return ""
    return (found.partition(b"\n")[2] if length > size else found).decode("utf-8", "replace")


def _parsed(lines: Sequence[str]) -> Iterator[dict[str, Any]]:
    for text in lines:
        try:
            line = json.loads(text)
        except ValueError:  # cut short by a crash
            continue
        if isinstance(line, dict) and {"kind", "step", "time"} <= line.keys():
            yield line


def _pace(lines: Sequence[dict[str, Any]]) -> float | None:
    """Seconds a step."""
    if len(lines) < 2 or lines[-1]["step"] <= lines[0]["step"]:
        return lines[-1].get("step_s") if lines else None
    return float((lines[-1]["time"] - lines[0]["time"]) / (lines[-1]["step"] - lines[0]["step"]))


def _saved(task: Task, lines: Sequence[dict[str, Any]]) -> tuple[int | None, float | None]:
    """The newest checkpoint, and when it was saved: by the pointer where it is a file, else by the record, since a
    table of many runs shall not wait for many stores."""
    if task.progress and "://" not in task.progress.checkpoints:
        pointer = Path(task.progress.checkpoints) / "latest"
        try:
            return int(pointer.read_text(encoding="utf-8").strip().removeprefix("step-")), pointer.stat().st_mtime
        except (OSError, ValueError):
            return None, None
    saved = _saves(lines) or _saves(list(_parsed(_save_lines(task.folder / "metrics.jsonl"))))
    return (saved[-1]["step"], saved[-1]["time"]) if saved else (None, None)


def _save_lines(path: Path) -> list[str]:
    return [line for line in read_end(path, LONG_TAIL_BYTES).splitlines() if '"checkpoint"' in line]


def _saves(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if line["kind"] == "checkpoint" and not line.get("problem")]


def heartbeat_age_s(run: Path, since: float = 0.0) -> float | None:
    """Seconds since any rank wrote its heartbeat; None where none did after `since`."""
    try:
        with os.scandir(run / "heartbeats") as entries:
            times = [each.stat().st_mtime for each in entries if each.name.endswith(".json")]
    except OSError:
        return None
    newest = max(times, default=0.0)
    return max(time.time() - newest, 0.0) if newest > since else None


def first_beat(run: Path) -> Beat | None:
    """What rank 0 has said last."""
    return parse_beat(read_text(beat_path(run, 0)))


def worry(run: Path, since: float) -> str:
    """What looks wrong with the heartbeats of a running start, or ""."""
    age_s = heartbeat_age_s(run, since)
    if age_s is None:
        late_s = time.time() - since
        return f"no heartbeat since it started {duration(late_s)} ago" if late_s > 2 * QUIET_S else ""
    if age_s > QUIET_S:
        return f"no heartbeat for {duration(age_s)}"
    beat = first_beat(run)
    if beat and not beat.left and beat.stood_s > _STANDS_S:
        return f"rank 0 is in '{beat.phase}' for {duration(beat.stood_s)}"
    return ""


def duration(seconds: float) -> str:
    """As short as it can be read: 45s, 12m, 3h05, 2d7h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}"
    return f"{whole // 86400}d{whole % 86400 // 3600}h"
