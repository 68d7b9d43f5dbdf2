"""`regen jobs logs`: what ranks, or the launcher above them, have said."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launcher import local_executor
from launcher.jobs.find import JobState, Member, has_ended, job_state, query_queue, shown_name
from launcher.retry import read_history
from regen_dist.errors import ConfigError

_BLOCK_BYTES = 2**16


def choose_logs(members: Sequence[Member], root: Path) -> Member:
    """The one task whose log is meant.

    Raises:
        ConfigError: there are several (names those that failed first).
    """
    if len(members) == 1:
        return members[0]
    queue = query_queue(members)
    stands = sorted(((job_state(each, queue).state, each) for each in members), key=lambda pair: pair[0] != "failed")
    names = [f"{shown_name(each.task.folder, root)} ({state})" for state, each in stands]
    more = f", and {len(names) - 5} more" if len(names) > 5 else ""
    raise ConfigError(f"there are {len(names)} tasks; give one of them: {', '.join(names[:5])}{more}")


def rank_log(member: Member, rank: int) -> Path:
    """What a rank prints."""
    return member.task.logs / f"rank_{rank}.log"


def launcher_logs(member: Member) -> list[Path]:
    """What the batch script, srun and Submitit have said of the newest submission, and the process that stands for it
    on this machine; those that are empty left out."""
    names = [member.queue_id]
    if member.job.cluster.kind == "local":
        names = [each.start.job for each in read_history(member.task.launch)]
    said = [path for name in names for path in sorted((member.job.folder / "submitit").glob(f"{name}_*_log.*"))]
    if member.job.cluster.kind == "slurm":  # "12_0_log.err" is of task 0 in an array, or of node 0 without one
        said = sorted((member.job.folder / "submitit").glob(f"{member.queue_id}_[0-9]*_log.*"))
    return [path for path in [*said, member.job.folder / local_executor.LOG] if path.is_file() and path.stat().st_size]


def log_sources(member: Member, rank: int | None, *, launcher: bool) -> list[Path]:
    """The files to show: a rank's log, or the launcher's where none is asked for and rank 0 has none."""
    log = rank_log(member, rank or 0)
    if log.is_file() and not launcher:
        return [log]
    return launcher_logs(member) if launcher or rank is None else []


def show(member: Member, rank: int | None, *, launcher: bool, lines: int) -> None:
    """Print the ends of the files.

    Raises:
        ConfigError: there are none.
    """
    files = log_sources(member, rank, launcher=launcher)
    if not files:
        raise ConfigError(_silent(member, rank))
    for path in files:
        if len(files) > 1:
            print(f"==> {path} <==")
        for line in last_lines(path, lines):
            print(line)


def _silent(member: Member, rank: int | None) -> str:
    known = sorted(int(path.stem.removeprefix("rank_")) for path in member.task.logs.glob("rank_*.log"))
    if rank is not None and known:
        return f"{rank_log(member, rank)}: not there; there are logs of ranks {known[0]} to {known[-1]}"
    return (
        f"{member.task.name} has no such log yet; `regen jobs` tells how it stands, --launcher what it was started by"
    )


def last_lines(path: Path, count: int) -> list[str]:
    """The newest lines of a file, read from its end."""
    text = newest_log(path, count).removesuffix(b"\n").decode("utf-8", "replace")
    return [visible(line) for line in text.split("\n")] if text else []


def newest_log(path: Path, count: int) -> bytes:
    """The last `count` lines of a file, as they are."""
    with path.open("rb") as file:
        position = file.seek(0, os.SEEK_END)
        found = b""
        while position and found.count(b"\n") <= count:
            size = min(_BLOCK_BYTES, position)
            position = file.seek(position - size)
            found = file.read(size) + found
    kept = count + found.endswith(b"\n")
    return b"\n".join(found.split(b"\n")[-kept:])


def visible(line: str) -> str:
    """What a terminal shows in the end of a line that was written over itself, as progress bars do."""
    return next((piece for piece in reversed(line.split("\r")) if piece), "")


# `regen jobs logs --follow`: what a task says while it says it, over requeues and restarts, to its end.

_POLL_S, _ASK_EVERY_S = 0.5, 5.0


class Follower:
    """Reads what is appended to a file, from the end of what is there; a file that is replaced or cut is read from its
    beginning."""

    def __init__(self, path: Path, start: int) -> None:
        self._path = path
        self._file = path.open("rb")
        self._file.seek(start)

    def read(self) -> bytes:
        """Everything new."""
        found = self._file.read()
        try:
            there = self._path.stat()
        except FileNotFoundError:  # moved away: a new one comes, or none
            return found
        if there.st_ino != os.fstat(self._file.fileno()).st_ino:
            self._file.close()
            self._file = self._path.open("rb")
            return found + self._file.read()
        if there.st_size < self._file.tell():
            self._file.seek(0)
            return found + self._file.read()
        return found

    def close(self) -> None:
        self._file.close()


class Printer:
    """Prints pieces of logs as they come: raw at a terminal, whole lines elsewhere."""

    def __init__(self, raw: bool) -> None:
        self._raw, self._path, self._rest = raw, Path(), b""

    def put(self, path: Path, new: bytes, *, headed: bool) -> None:
        """More of one file; its name first where it is not the one before."""
        if not new:
            return
        if path != self._path:
            self.end()
            if headed:
                self._write(f"==> {path} <==\n".encode())
            self._path = path
        if self._raw:
            self._write(new)
            return
        *lines, self._rest = (self._rest + new).split(b"\n")
        for line in lines:
            self._write(visible(line.decode("utf-8", "replace")).encode() + b"\n")

    def end(self) -> None:
        """What is left of a line without an end."""
        if self._rest:
            self._write(visible(self._rest.decode("utf-8", "replace")).encode() + b"\n")
        self._rest = b""

    @staticmethod
    def _write(data: bytes) -> None:
        sys.stdout.buffer.write(data)
        sys.stdout.flush()


class Watch:
    """How a task stands. Its scheduler is not asked more often than it likes; the end is in the history at once."""

    def __init__(self, member: Member) -> None:
        self._member, self._asked_at, self._last = member, float("-inf"), JobState("pending")

    def look(self) -> JobState:
        now = time.monotonic()
        if now - self._asked_at >= _ASK_EVERY_S or has_ended(self._member):
            self._last, self._asked_at = job_state(self._member, query_queue([self._member])), now
        return self._last


def follow(member: Member, rank: int | None, *, launcher: bool, lines: int) -> JobState:
    """Print the ends of the files, then what is appended to them, until the task has ended for good; how it stands
    then."""
    followers: dict[Path, Follower] = {}
    printer, watch = Printer(raw=sys.stdout.isatty()), Watch(member)
    own = rank_log(member, rank or 0)
    try:
        while True:
            active = watch.look().active  # first: what is said before the end is read after it
            files = [own] if own in followers else log_sources(member, rank, launcher=launcher)
            for path in files:
                if path not in followers:
                    followers[path] = Follower(path, path.stat().st_size - len(newest_log(path, lines)))
                printer.put(path, followers[path].read(), headed=len(files) > 1)
            if not active:
                printer.end()
                return watch.look()
            time.sleep(_POLL_S)
    finally:
        for each in followers.values():
            each.close()
