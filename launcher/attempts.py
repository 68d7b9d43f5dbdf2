"""Records of a task's attempts, below its `launch` folder: the exit status of every rank, and the history of starts and
ends. `launcher.retry` writes and decides by them; `regen jobs`, pipelines and preflight read them. Imports no torch."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import ValidationError

from regen_dist.config.files import write_text_atomically
from regen_dist.config.run import Section

# Exit status of each rank of a start: one small file per rank, written by its parent process, which outlives a rank
# that is killed.


class RankExit(Section):
    """Exit code of a rank (128+n if signal n ended it), and the signals it had been sent."""

    rank: int
    node: str
    code: int
    told: tuple[str, ...] = ()  # signals sent to the rank, in order; the key in the file
    time: float


def folder(launch: Path, job: str, restart: int) -> Path:
    """Return the folder of one start's rank exit files."""
    return launch / "ranks" / f"{job}-{restart}"


def write_rank_exit(
    launch: Path, job: str, restart: int, *, rank: int, node: str, code: int, signals: Sequence[str]
) -> None:
    """Write a rank's exit file; if that fails, print a warning and rely on the exit code alone."""
    ended = RankExit(rank=rank, node=node, code=code, told=tuple(signals), time=time.time())
    try:
        write_text_atomically(folder(launch, job, restart) / f"rank-{rank:05d}.json", ended.model_dump_json() + "\n")
    except OSError as error:
        print(f"launcher: warning: exit status {code} of rank {rank} was not recorded: {error}", file=sys.stderr)


def prune_rank_exits(launch: Path, keep: int = 3) -> None:
    """Delete the rank exit files of older starts: hundreds of files each."""
    folders = sorted((launch / "ranks").glob("*"), key=lambda each: each.stat().st_mtime)
    for old in folders[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def read_rank_exits(launch: Path, job: str, restart: int, world_size: int) -> list[RankExit | None]:
    """Return the rank exits of a start in order of time; None for each rank without a file."""
    found = []
    for path in folder(launch, job, restart).glob("rank-*.json"):
        try:
            found.append(RankExit.model_validate_json(path.read_text(encoding="utf-8")))
        except (OSError, ValidationError):
            continue
    silent: list[RankExit | None] = [None] * (world_size - len(found))
    return [*sorted(found, key=lambda each: each.time), *silent]


def hung_hosts(run: Path) -> set[str]:
    """Return the hosts of the hung ranks, if the run ended with the exit code of a hang."""
    try:
        report = json.loads((run / "hang.json").read_text(encoding="utf-8"))
        return {each["host"].partition(".")[0] for each in report["ranks"]} if report["kind"] != "together" else set()
    except (OSError, ValueError, KeyError, TypeError):
        return set()


# History of a task: its starts and ends, as lines of `launch/starts.jsonl`. Only one process writes at a time: the
# job's batch script, or its counterpart on this machine.

HISTORY_FILE = "starts.jsonl"
Why = Literal["done", "preempted", "time limit", "signal", "stopped", "failed", "node lost", "unknown"]


class Start(Section):
    """Start of an attempt: job, nodes, and the step it resumes from (None: unknown, or not training)."""

    kind: Literal["start"] = "start"
    job: str
    restart: int
    nodes: tuple[str, ...]
    step: int | None = None
    time: float


class End(Section):
    """End of an attempt and the decision taken. `at_fault`: nodes that caused the failure."""

    kind: Literal["end"] = "end"
    why: Why
    code: int
    text: str
    again: bool
    at_fault: tuple[str, ...] = ()
    time: float


class Attempt(NamedTuple):
    """A start and its end; end is None while it runs or if it was killed before recording one."""

    start: Start
    end: End | None


def read_history(launch: Path) -> list[Attempt]:
    """Return every attempt of a task, oldest first; truncated lines are skipped."""
    attempts: list[Attempt] = []
    path = launch / HISTORY_FILE
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []:
        entry = _parse(line)
        if isinstance(entry, Start):
            attempts.append(Attempt(entry, None))
        elif entry is not None and attempts:
            attempts[-1] = Attempt(attempts[-1].start, entry)
    return attempts


def attempts_since(history: Sequence[Attempt], since: float) -> Sequence[Attempt]:
    """Return the attempts that began after a submission (seconds since the epoch)."""
    return [each for each in history if each.start.time >= since]


def _parse(line: str) -> Start | End | None:
    try:
        values = json.loads(line)
        return (Start if values["kind"] == "start" else End).model_validate(values)
    except (ValueError, KeyError, TypeError, ValidationError):
        return None


def write_entry(launch: Path, entry: Start | End) -> None:
    """Append a line and fsync it: the process may be killed right afterwards."""
    launch.mkdir(parents=True, exist_ok=True)
    with (launch / HISTORY_FILE).open("ab") as file:
        # A truncated last line must not absorb this one.
        file.write(b"" if _ends_with_newline(launch / HISTORY_FILE) else b"\n")
        file.write(entry.model_dump_json().encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def archive(name: str) -> str:
    """Return the file name of an old history."""
    return f"starts-{name}.jsonl"


def archive_history(launch: Path, name: str) -> None:
    """Start a new history; the old one is renamed to `starts-NAME.jsonl`."""
    if (launch / HISTORY_FILE).is_file():
        os.replace(launch / HISTORY_FILE, launch / archive(name))


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def now() -> float:
    """Return seconds since the epoch, rounded for the history."""
    return round(time.time(), 3)


def submission_time(tasks: Iterable[Path]) -> float:
    """Return the time of a submission, for its job file: now, but after all starts of its tasks, by whatever clocks.

    Args:
        tasks: `launch` folders.
    """
    starts = [each.start.time for launch in tasks for each in read_history(launch)]
    return max([time.time(), *(start + 0.001 for start in starts)])
