"""`regen jobs logs`: logs of ranks and of the launcher."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launcher import local_executor
from launcher.attempts import read_history
from launcher.jobs.find import JobState, Member, has_final_end, job_state, query_queue, shown_name
from regen_dist.errors import ConfigError

_BLOCK_BYTES = 2**16


def choose_logs(members: Sequence[Member], root: Path) -> Member:
    """Select the single task whose log is shown.

    Raises:
        ConfigError: there are several (lists those that failed first).
    """
    if len(members) == 1:
        return members[0]
    queue = query_queue(members)
    states = sorted(((job_state(each, queue).state, each) for each in members), key=lambda pair: pair[0] != "failed")
    names = [f"{shown_name(each.task.folder, root)} ({state})" for state, each in states]
    more = f", and {len(names) - 5} more" if len(names) > 5 else ""
    raise ConfigError(f"there are {len(names)} tasks; give one of them: {', '.join(names[:5])}{more}")


def rank_log(member: Member, rank: int) -> Path:
    """Return the path of a rank's log."""
    return member.task.logs / f"rank_{rank}.log"


def launcher_logs(member: Member) -> list[Path]:
    """Return the non-empty logs of the batch script, srun and Submitit for the newest submission, or of its supervisor
    on this machine."""
    local = member.job.cluster.kind == "local"
    names = [each.start.job for each in read_history(member.task.launch)] if local else [member.queue_id]
    folder = member.job.folder / "submitit"  # "12_0_log.err": task 0 of an array, or node 0 of a single job
    log_files = [path for name in names for path in sorted(folder.glob(f"{name}_[0-9]*_log.*"))]
    log_files.append(member.job.folder / local_executor.LOG)
    return [path for path in log_files if path.is_file() and path.stat().st_size]


def log_sources(member: Member, rank: int | None, *, launcher: bool) -> list[Path]:
    """Return the files to show: a rank's log, or the launcher's if no rank was given and rank 0 has no log."""
    log = rank_log(member, rank or 0)
    if log.is_file() and not launcher:
        return [log]
    return launcher_logs(member) if launcher or rank is None else []


def show(member: Member, rank: int | None, *, launcher: bool, lines: int) -> None:
    """Print the last lines of the files.

    Raises:
        ConfigError: there are no files.
    """
    files = log_sources(member, rank, launcher=launcher)
    if not files:
        raise ConfigError(_no_logs(member, rank))
    for path in files:
        if len(files) > 1:
            print(f"==> {path} <==")
        for line in last_lines(path, lines):
            print(line)


def _no_logs(member: Member, rank: int | None) -> str:
    names = (path.stem.removeprefix("rank_") for path in member.task.logs.glob("rank_*.log"))
    known = sorted(int(name) for name in names if name.isdecimal())
    if rank is not None and known:
        return f"{rank_log(member, rank)}: not there; there are logs of ranks {known[0]} to {known[-1]}"
    return (
        f"{member.task.name} has no such log yet; `regen jobs` shows its state, --launcher the output of the launcher"
    )


def last_lines(path: Path, count: int) -> list[str]:
    """Return the last lines of a file, read from its end."""
    text = last_bytes(path, count).removesuffix(b"\n").decode("utf-8", "replace")
    return [visible(line) for line in text.split("\n")] if text else []


def last_bytes(path: Path, count: int) -> bytes:
    """Return the last `count` lines of a file, unchanged."""
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
    """Return the visible part of a line that overwrites itself, as progress bars do."""
    return next((piece for piece in reversed(line.split("\r")) if piece), "")


# `regen jobs logs --follow`: follow a task's logs across requeues and restarts until it ends.

_POLL_S, _ASK_EVERY_S = 0.5, 5.0


class Follower:
    """Reader of appended data, starting at the current end; a replaced or truncated file is read from its beginning."""

    def __init__(self, path: Path, start: int) -> None:
        self._path = path
        self._file = path.open("rb")
        self._file.seek(start)

    def read(self) -> bytes:
        """Everything new."""
        found = self._file.read()
        try:
            there = self._path.stat()
        except FileNotFoundError:  # moved away; a new file may follow
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
    """Printer of log pieces: raw at a terminal, whole lines elsewhere."""

    def __init__(self, raw: bool) -> None:
        self._raw, self._path, self._rest = raw, Path(), b""

    def write(self, path: Path, new: bytes, *, headed: bool) -> None:
        """Print more of one file, preceded by its name if the file has changed."""
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
        """Print a last line that has no newline."""
        if self._rest:
            self._write(visible(self._rest.decode("utf-8", "replace")).encode() + b"\n")
        self._rest = b""

    @staticmethod
    def _write(data: bytes) -> None:
        sys.stdout.buffer.write(data)
        sys.stdout.flush()


class StateWatch:
    """State of a task. Queries to the scheduler are rate-limited; the end is read from the history immediately."""

    def __init__(self, member: Member) -> None:
        self._member, self._asked_at, self._last = member, float("-inf"), JobState("pending")

    def poll(self) -> JobState:
        now = time.monotonic()
        if now - self._asked_at >= _ASK_EVERY_S or has_final_end(self._member):
            self._last, self._asked_at = job_state(self._member, query_queue([self._member])), now
        return self._last


def follow(member: Member, rank: int | None, *, launcher: bool, lines: int) -> JobState:
    """Print the last lines of the files, then appended data until the task has ended; return its final state."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # each of a thousand ranks has two files
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    followers: dict[Path, Follower] = {}
    printer, watch = Printer(raw=sys.stdout.isatty()), StateWatch(member)
    own = rank_log(member, rank or 0)
    try:
        while True:
            active = watch.poll().active  # read the state first: output written before the end is then still printed
            files = [own] if own in followers else log_sources(member, rank, launcher=launcher)
            for path in files:
                if path not in followers:
                    followers[path] = Follower(path, path.stat().st_size - len(last_bytes(path, lines)))
                printer.write(path, followers[path].read(), headed=len(files) > 1)
            if not active:
                printer.end()
                return watch.poll()
            time.sleep(_POLL_S)
    finally:
        for each in followers.values():
            each.close()
