"""`regen jobs logs --follow`: what a task says while it says it, over requeues and restarts, to its end."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from launcher.jobs.finding import Member
from launcher.jobs.logs import newest, rank_log, sources, visible
from launcher.jobs.queue import ask, has_ended
from launcher.jobs.standing import Standing, standing

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
        self._member, self._asked_at, self._last = member, float("-inf"), Standing("pending")

    def look(self) -> Standing:
        now = time.monotonic()
        if now - self._asked_at >= _ASK_EVERY_S or has_ended(self._member):
            self._last, self._asked_at = standing(self._member, ask([self._member])), now
        return self._last


def follow(member: Member, rank: int | None, *, launcher: bool, lines: int) -> Standing:
    """Print the ends of the files, then what is appended to them, until the task has ended for good; how it stands
    then."""
    followers: dict[Path, Follower] = {}
    printer, watch = Printer(raw=sys.stdout.isatty()), Watch(member)
    own = rank_log(member, rank or 0)
    try:
        while True:
            active = watch.look().active  # first: what is said before the end is read after it
            files = [own] if own in followers else sources(member, rank, launcher=launcher)
            for path in files:
                if path not in followers:
                    followers[path] = Follower(path, path.stat().st_size - len(newest(path, lines)))
                printer.put(path, followers[path].read(), headed=len(files) > 1)
            if not active:
                printer.end()
                return watch.look()
            time.sleep(_POLL_S)
    finally:
        for each in followers.values():
            each.close()
