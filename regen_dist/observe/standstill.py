"""What a rank does about a standstill: its heartbeat, a warning, and at the limit the verdict and the stacks.

In the ordinary course a rank writes its own heartbeat and reads nothing. When its own main thread has made no mark for
long, it looks. So that hundreds of ranks do not read hundreds of files each, only some look at all of them: the
deputies, ranks 0 to 7 and then every power of two, which lie on different hosts. The lowest of them that lives speaks.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from regen_dist.config.keeping import HangConfig
from regen_dist.errors import HangError
from regen_dist.jsontext import json_text
from regen_dist.observe.culprit import Finding, describe, find_culprits
from regen_dist.observe.heartbeat import (
    RUNNING,
    Beat,
    Heartbeats,
    Marked,
    Seen,
    beat_path,
    place_of_processes,
    read_text,
    replace_text,
    write_beat,
)

_FIRST_DEPUTIES = 8


def tick_s(config: HangConfig) -> float:
    """How often a watching thread looks up."""
    return min(config.beat_s, 1.0)


def stale_s(config: HangConfig) -> float:
    """A heartbeat that was seen unchanged for so long is not written any more."""
    return 3 * config.beat_s + 1.0


def is_deputy(rank: int) -> bool:
    """Whether this rank looks at all the others when the run stands still."""
    return rank < _FIRST_DEPUTIES or rank & (rank - 1) == 0


class Standstill:
    """For how long the main thread has made no mark, and how long it may. Until the first step is over the patience is
    that of the start: models are built, state is loaded, and kernels are compiled in the first step itself."""

    def __init__(self, config: HangConfig, now: float) -> None:
        self._config, self._since = config, now
        self._mark: Marked | None = None
        self.starting = True
        self.stood_s = 0.0

    def see(self, now: float, mark: Marked) -> float | None:
        """Take note of the newest mark. When it is another one, the seconds that the one before it lasted."""
        self.stood_s = now - self._since
        if mark is self._mark:
            return None
        lasted_s, self._since, self._mark, self.stood_s = self.stood_s, now, mark, 0.0
        self.starting = mark[3] < 2
        return lasted_s

    @property
    def limit_s(self) -> float:
        return self._config.start_limit_s if self.starting else self._config.limit_s

    @property
    def warn_s(self) -> float:
        """At the start, later by as much as its limit is."""
        return self._config.warn_s * self.limit_s / self._config.limit_s

    @property
    def limit_key(self) -> str:
        return "guards.hang.start_limit_s" if self.starting else "guards.hang.limit_s"


class Monitor:
    """One rank's part in it. It knows no threads: whoever owns it calls `tick` every `tick_s`.

    Args:
        run: the run folder.
        rank: this rank.
        world_size: ranks of the run.
        config: the limits.
        say: prints a line where people look.
        dump: writes this process's stacks below the given header line.
        end: ends this process with the given exit code, and does not return.
        now: the owner's clock at the start, as in `tick`.
    """

    def __init__(
        self,
        run: Path,
        rank: int,
        world_size: int,
        config: HangConfig,
        *,
        say: Callable[[str], None],
        dump: Callable[[str], None],
        end: Callable[[int], None],
        now: float = 0.0,
    ) -> None:
        self._run, self._rank, self._world_size, self._config = run, rank, world_size, config
        self._say, self._dump, self._end = say, dump, end
        self._stand, self._beats = Standstill(config, now), Heartbeats(run)
        self._stale_s, self._tick_s = stale_s(config), tick_s(config)
        self._moment_s = 2 * self._tick_s + 1.0  # in which another rank sees what this one has done
        self._next_beat = self._next_look = now
        self._number, self._cannot_write = 0, False
        self._beat: Beat | None = None
        self._seen: list[Seen] = []
        self._considered = self._warned = False
        self._leave_at: float | None = None
        self._old = self._forget_old()

    def tick(self, now: float, mark: Marked) -> None:
        """Beat when it is time, and judge how long the main thread has been at its newest mark."""
        lasted_s = self._stand.see(now, mark)
        if lasted_s is not None:
            self._go_on(lasted_s)
        if now >= self._next_beat:
            self._next_beat = now + self._config.beat_s
            self._write(self._beat_now(mark))
        if self._leave_at is not None:
            if now >= self._leave_at:
                self._end(HangError.exit_code)
        elif self._stand.stood_s >= min(2 * self._config.beat_s, self._stand.warn_s):
            self._judge(now, mark)

    def close(self, mark: Marked, why: str = "") -> None:
        """The last heartbeat: that this rank has ended, well or for the reason given."""
        self._write(self._beat_now(mark).ending(why))

    def verdict(self) -> str:
        """What a rank has found in this start of the run; empty while nothing was found."""
        text = read_text(self._run / "hang.json")
        if not text or text == self._old:
            return ""
        try:
            return str(json.loads(text)["message"])
        except (ValueError, KeyError, TypeError):
            return f"{self._run / 'hang.json'} cannot be read"

    # --- judging ---

    def _judge(self, now: float, mark: Marked) -> None:
        stood_s, limit_s, warn_s = self._stand.stood_s, self._stand.limit_s, self._stand.warn_s
        if message := self.verdict():
            self._leave(now, message, speak=self._rank == 0)
            return
        self._look_around(now, mark)
        if stood_s >= limit_s + self._wait_s():
            self._pronounce(now, mark)
        elif warn_s <= stood_s < limit_s and not self._considered and is_deputy(self._rank):
            self._considered = True
            if not self._has_speaker():
                self._warned = True
                left_s = limit_s - stood_s
                self._say(
                    f"warning: {self._describe(self._find())}; the run is ended if nothing moves for {left_s:.0f} s"
                )

    def _wait_s(self) -> float:
        """How long after the limit this rank leaves the word to another."""
        if not is_deputy(self._rank):
            return 2 * self._stale_s
        return self._moment_s if self._has_speaker() else 0.0

    def _look_around(self, now: float, mark: Marked) -> None:
        """Deputies look at all ranks for some time before they may have to speak, the others only when none spoke."""
        stood_s, ahead_s = self._stand.stood_s, 2 * self._stale_s
        if is_deputy(self._rank):
            before_warning = not self._considered and stood_s >= self._stand.warn_s - ahead_s
            needed = before_warning or stood_s >= self._stand.limit_s - ahead_s
        else:
            needed = stood_s >= self._stand.limit_s + self._moment_s
        if needed and now >= self._next_look:
            self._next_look = now + self._config.beat_s
            self._seen = self._look(now, mark)

    def _look(self, now: float, mark: Marked) -> list[Seen]:
        return [
            Seen(rank, self._beat_now(mark), 0.0) if rank == self._rank else self._beats.look(rank, now)
            for rank in range(self._world_size)
        ]

    def _has_speaker(self) -> bool:
        """Whether a lower deputy lives and waits too."""
        return any(
            each.beat is not None
            and each.beat.state == RUNNING
            and each.quiet_s < self._stale_s
            and each.beat.stood_s >= self._stand.warn_s / 2
            for each in self._seen[: self._rank]
            if is_deputy(each.rank)
        )

    def _find(self) -> Finding:
        return find_culprits(self._seen, self._stale_s)

    def _describe(self, finding: Finding) -> str:
        return describe(finding, self._world_size, self._stand.stood_s)

    # --- speaking ---

    def _pronounce(self, now: float, mark: Marked) -> None:
        self._seen = self._look(now, mark)
        finding = self._find()
        message = (
            f"{self._describe(finding)}. The run is ended; the stacks of its ranks are in {self._run / 'stacks'}. "
            "The same command goes on from the newest checkpoint. If this phase may last so long, raise "
            f"{self._stand.limit_key} (now {self._stand.limit_s:g})"
        )
        self._dump(f"rank {self._rank}: {message}")
        try:
            replace_text(self._run / "hang.json", json_text(self._facts(finding, message), indent=1) + "\n")
        except OSError as error:
            self._complain(error)
        self._leave(now, message, speak=True, dumped=True)

    def _facts(self, finding: Finding, message: str) -> dict[str, object]:
        ranks = [
            {"rank": each.rank, "quiet_s": round(each.quiet_s, 3)}
            | (
                {}
                if each.beat is None
                else {name: getattr(each.beat, name) for name in ("host", "pid", "why", "stood_s")}
            )
            | ({} if each.beat is None else {"step": each.beat.step, "phase": each.beat.mark.phase})
            for each in finding.ranks
        ]
        return {"message": message, "kind": finding.kind, "ranks": ranks, "by": self._rank, "written": time.time()}

    def _leave(self, now: float, message: str, *, speak: bool, dumped: bool = False) -> None:
        """Dump, and end in a moment: the others need one to see the verdict."""
        if not dumped:
            self._dump(f"rank {self._rank}: {message}")
        if speak:
            self._say(f"error: {message}")
        self._leave_at = now + self._moment_s

    def _go_on(self, lasted_s: float) -> None:
        if self._warned and self._leave_at is None:
            self._say(f"the run goes on after it stood still for {lasted_s:.0f} s")
        self._considered = self._warned = False

    # --- files ---

    def _beat_now(self, mark: Marked) -> Beat:
        self._number += 1
        host, namespace = place_of_processes()
        step, place, phase, begun = mark
        return Beat(
            rank=self._rank, host=host, namespace=namespace, pid=os.getpid(), step=step, begun=begun, place=place,
            phase=phase, left="", why="", stood_s=round(self._stand.stood_s, 3), number=self._number,
            written=time.time(),
        )  # fmt: skip

    def _write(self, beat: Beat) -> None:
        try:
            write_beat(self._run, beat)
        except OSError as error:
            self._complain(error)

    def _complain(self, error: OSError) -> None:
        """A disk that is full is no reason to end a run that works."""
        if not self._cannot_write:
            self._cannot_write = True
            self._say(f"warning: rank {self._rank} cannot write its heartbeat and goes on without: {error}")

    def _forget_old(self) -> str:
        """Rank 0 puts away what an earlier start has left; the others know it when they see it. Returns the earlier
        verdict. A rank that began before rank 0 writes its file again with its next heartbeat."""
        old = read_text(self._run / "hang.json")
        if self._rank == 0:
            try:
                if old:
                    os.replace(self._run / "hang.json", self._run / "hang-previous.json")
                for path in beat_path(self._run, 0).parent.glob("rank-*"):
                    path.unlink(missing_ok=True)
            except OSError as error:
                self._complain(error)
        return old
