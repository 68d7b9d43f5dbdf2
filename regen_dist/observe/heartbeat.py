"""Heartbeats: one small file for each rank with its current phase, and readers of the other ranks' files.

A reader decides that a file is stale by reading it twice: clocks of other machines are never compared. Files are
replaced atomically but not synced: they are worthless after a crash, and a sync might wait for a checkpoint that is
being written.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

from regen_dist.jsontext import json_text

RUNNING, ENDED, FAILED = "running", "ended", "failed"


# Last progress mark of the main thread: the optimizer step (None before the first), the index of the phase in the step,
# the phase, and the steps begun since the start. A plain tuple, because the main thread must create it at no cost.
Marked = tuple[int | None, int, str, int]
FIRST_MARK: Marked = (None, 0, "start", 0)


def next_mark(last: Marked, phase: str, step: int | None) -> Marked:
    """Return the mark after `last`, always a new object. A phase marked again keeps its index: ranks may differ in how
    often they mark it."""
    last_step, place, last_phase, begun = last
    if step is None or step == last_step:
        return last_step, place if phase == last_phase else place + 1, phase, begun
    return step, 0, phase, begun + 1


@dataclass(frozen=True)
class Beat:
    """Heartbeat of a rank. `stood_s`: seconds since its main thread's last mark, by its own clock."""

    rank: int
    host: str
    namespace: str  # process id namespace of `pid`
    pid: int
    step: int | None
    begun: int  # steps begun since the start: unlike `step`, it never decreases in a rollback
    place: int
    phase: str  # or "ended", or "failed"
    left: str  # the phase in which it ended or failed; empty while it runs
    why: str  # reason of the failure
    stood_s: float
    number: int  # counter of the heartbeats
    written: float  # seconds since the epoch, for people

    @property
    def state(self) -> str:
        return self.phase if self.left else RUNNING

    @property
    def last_phase(self) -> str:
        """Return the phase of its last mark, also once it has ended."""
        return self.left or self.phase

    def ending(self, why: str) -> Beat:
        """Return the last heartbeat of a rank that ended normally, or failed for the given reason."""
        return replace(self, phase=FAILED if why else ENDED, left=self.phase, why=why)


def beat_path(run: Path, rank: int) -> Path:
    """Return the path of a rank's heartbeat in the run folder."""
    return run / "heartbeats" / f"rank-{rank:05d}.json"


def replace_file(path: Path, text: str) -> None:
    """Replace a small file atomically, without a sync to disk."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_beat(run: Path, beat: Beat) -> None:
    """Replace this rank's heartbeat.

    Raises:
        OSError: the file system refuses.
    """
    path = beat_path(run, beat.rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json_text(asdict(beat)) + "\n")


def parse_beat(text: str) -> Beat | None:
    """Parse a heartbeat; None for anything else, such as a file of another version."""
    try:
        found = json.loads(text)
        return Beat(**{each.name: found[each.name] for each in fields(Beat)})
    except (ValueError, KeyError, TypeError):
        return None


class Seen(NamedTuple):
    """Observation of a rank: its newest heartbeat (None if there is none), and for how long it was seen unchanged."""

    rank: int
    beat: Beat | None
    quiet_s: float


class Heartbeats:
    """Reader of the ranks' heartbeats, which remembers since when each was seen unchanged."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._known: dict[int, tuple[str, float]] = {}  # text, and when it was first seen

    def read(self, rank: int, now: float) -> Seen:
        """Read one heartbeat; `now` in seconds of the reader's clock. On the first reading `quiet_s` is 0."""
        text = read_text(beat_path(self._run, rank))
        if rank not in self._known or self._known[rank][0] != text:
            self._known[rank] = (text, now)
        return Seen(rank, parse_beat(text), now - self._known[rank][1])


def read_text(path: Path) -> str:
    """Return the text of a small file; empty if it does not exist or cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


class AwakeClock:
    """Clock that leaves out suspensions of the process, for a thread that reads it regularly.

    A job that is suspended (SIGSTOP, a laptop that sleeps) and resumed hours later was not hanging: between two
    readings at most `longest_s` count.
    """

    def __init__(self, longest_s: float, clock: Callable[[], float]) -> None:
        self._longest_s, self._clock = longest_s, clock
        self._last, self._awake_s = clock(), 0.0

    def read(self) -> float:
        now = self._clock()
        self._awake_s += min(now - self._last, self._longest_s)
        self._last = now
        return self._awake_s


@cache
def host_and_namespace() -> tuple[str, str]:
    """Return the host name and the process id namespace (containers may share a host name)."""
    try:
        return socket.gethostname(), os.readlink("/proc/self/ns/pid")
    except OSError:
        return socket.gethostname(), ""


def process_state(beat: Beat) -> str | None:
    """Return the state letter of a rank's process as in `ps` ("T": stopped), "" if it is gone, or None if it cannot be
    determined here, as for a rank on another host."""
    if (beat.host, beat.namespace) != host_and_namespace() or not beat.namespace:
        return None
    try:
        return (
            Path(f"/proc/{beat.pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
        )
    except (FileNotFoundError, ProcessLookupError):
        return ""
    except OSError:
        return None
