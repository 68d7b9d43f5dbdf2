"""Heartbeats: one small file a rank, which says what that rank does, and the reading of the others' files.

A file is told stale by its reader alone, who looks twice: no clock of another machine is believed. Each one is written
to a new name and moved into place, and not synced: it is worth nothing after a crash, and a sync may wait long for a
checkpoint that is being written.
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


class Mark(NamedTuple):
    """What the main thread said last: the optimizer step (None before the first), how many phases of this step came
    before, and the phase."""

    step: int | None
    place: int
    phase: str


# A Mark without its names, since what the main thread makes must cost nothing; and how many steps this start has begun.
Marked = tuple[int | None, int, str, int]
FIRST_MARK: Marked = (None, 0, "start", 0)


def next_mark(last: Marked, phase: str, step: int | None) -> Marked:
    """The mark after `last`, always another object. A phase that is marked again keeps its place: ranks may differ in
    how often they do."""
    last_step, place, last_phase, begun = last
    if step is None or step == last_step:
        return last_step, place if phase == last_phase else place + 1, phase, begun
    return step, 0, phase, begun + 1


@dataclass(frozen=True)
class Beat:
    """What a rank writes about itself. `stood_s`: seconds since its main thread's last mark, by its own clock."""

    rank: int
    host: str
    namespace: str  # within which `pid` counts
    pid: int
    step: int | None
    begun: int  # steps in this start: unlike `step`, it never goes back, as a run does after a spike
    place: int
    phase: str  # or "ended", or "failed"
    left: str  # the phase that it ended or failed in; empty while it runs
    why: str  # it failed
    stood_s: float
    number: int  # of the heartbeat: no two are alike
    written: float  # seconds since the epoch, for people

    @property
    def state(self) -> str:
        return self.phase if self.left else RUNNING

    @property
    def mark(self) -> Mark:
        return Mark(self.step, self.place, self.left or self.phase)

    def ending(self, why: str) -> Beat:
        """The last one: of a rank that ended well, or for the reason given."""
        return replace(self, phase=FAILED if why else ENDED, left=self.phase, why=why)


def beat_path(run: Path, rank: int) -> Path:
    """Where a rank's heartbeat lies in the run folder."""
    return run / "heartbeats" / f"rank-{rank:05d}.json"


def replace_text(path: Path, text: str) -> None:
    """Put a small file in its place at once: no reader sees half of it."""
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
    replace_text(path, json_text(asdict(beat)) + "\n")


def parse_beat(text: str) -> Beat | None:
    """A heartbeat as it was written; None for anything else, such as a file of another version."""
    try:
        found = json.loads(text)
        return Beat(**{each.name: found[each.name] for each in fields(Beat)})
    except (ValueError, KeyError, TypeError):
        return None


class Seen(NamedTuple):
    """What is known of a rank: its newest heartbeat (None: there is none), and for how long it was seen not to
    change."""

    rank: int
    beat: Beat | None
    quiet_s: float


class Heartbeats:
    """Reads the ranks' files, and remembers since when each was seen as it is."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._known: dict[int, tuple[str, float]] = {}  # text, and when it was first seen

    def look(self, rank: int, now: float) -> Seen:
        """One look at one file; `now` in seconds of the reader's clock. Of the first look, `quiet_s` is 0."""
        text = read_text(beat_path(self._run, rank))
        if rank not in self._known or self._known[rank][0] != text:
            self._known[rank] = (text, now)
        return Seen(rank, parse_beat(text), now - self._known[rank][1])


def read_text(path: Path) -> str:
    """A small file as it is; empty when it is not there, or cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


class AwakeClock:
    """Seconds that this process was awake, as told by a thread that reads the clock regularly.

    When a whole job is suspended (SIGSTOP, a laptop that sleeps) and goes on hours later, nobody stood still: between
    two readings at most `longest_s` count.
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
    """This host, and the namespace in which its process ids count (containers may share a host's name)."""
    try:
        return socket.gethostname(), os.readlink("/proc/self/ns/pid")
    except OSError:
        return socket.gethostname(), ""


def process_state(beat: Beat) -> str | None:
    """The state letter of a rank's process as in `ps` ("T": stopped), "" when it is gone; None when it is not known
    here, as for a rank on another host."""
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
