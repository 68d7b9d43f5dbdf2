"""What a rank does about a standstill: its heartbeat, a warning, and at the limit the verdict and the stacks.

In the ordinary course a rank writes its own heartbeat and reads nothing. When its own main thread has made no mark for
long, it looks. So that hundreds of ranks do not read hundreds of files each, only some look at all of them: the
deputies, ranks 0 to 7 and then every power of two, which lie on different hosts. The lowest of them that lives speaks.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, NamedTuple

from regen_dist.config.run import HangConfig
from regen_dist.errors import EXIT_OK, EXIT_RESUME, HangError
from regen_dist.jsontext import json_text
from regen_dist.observe.heartbeat import (
    ENDED,
    FAILED,
    FIRST_MARK,
    RUNNING,
    AwakeClock,
    Beat,
    Heartbeats,
    Marked,
    Seen,
    beat_path,
    host_and_namespace,
    next_mark,
    process_state,
    read_text,
    replace_text,
    write_beat,
)

# Which rank do the others wait for? Worked out from what every rank's heartbeat says, and put into words.

Kind = Literal["failed", "quiet", "behind", "together"]
_NAMED = 8  # ranks in a list, before it says how many more there are


class HangFinding(NamedTuple):
    """The ranks that the others wait for, and what tells them apart.

    failed: they ended with an error. quiet: they give no heartbeat. behind: they are in an earlier phase. together:
    nothing tells them apart, these are all ranks that still run.
    """

    kind: Kind
    ranks: tuple[Seen, ...]


def find_culprits(seen: Sequence[Seen], stale_s: float) -> HangFinding:
    """Who holds the others up, in this order: who failed, who gives no heartbeat for `stale_s`, who is behind.

    Ranks mark the same phases in the same order, so that the smallest (steps begun, place in the step) is behind. A
    rank that has ended well is ahead of the others in its last step.
    """
    if failed := tuple(each for each in seen if each.beat and each.beat.state == FAILED):
        return HangFinding("failed", failed)
    if quiet := tuple(each for each in seen if not _ended(each) and each.quiet_s >= stale_s):
        return HangFinding("quiet", quiet)
    known = [each for each in seen if each.beat]
    first = min(map(_progress, known), default=(0.0, 0.0))
    if len({(each.beat.begun, each.beat.phase) for each in known if each.beat}) > 1:
        return HangFinding("behind", tuple(each for each in known if _progress(each) == first))
    return HangFinding("together", tuple(known))


def _ended(seen: Seen) -> bool:
    return seen.beat is not None and seen.beat.state == ENDED


def _progress(seen: Seen) -> tuple[float, float]:
    assert seen.beat is not None
    return seen.beat.begun, math.inf if _ended(seen) else seen.beat.place


def describe_hang(
    finding: HangFinding,
    world_size: int,
    stood_s: float,
    state_of: Callable[[Beat], str | None] = process_state,
) -> str:
    """One sentence that names rank, host, process, phase and step.

    Args:
        finding: what `find_culprits` gave.
        world_size: ranks of the run.
        stood_s: how long the observer has waited.
        state_of: a process's state letter, "" when it is gone, None when it cannot be known here.
    """
    first = finding.ranks[0]
    waited_s = max(stood_s, first.beat.stood_s) if first.beat else stood_s
    told = " by its last heartbeat" if finding.kind == "quiet" and first.beat else ""  # it may have gone on a little
    subject = f"{_names(finding, world_size)} stood still for {waited_s:.0f} s {_where(first.beat)}{told}"
    reason = _reason(finding.kind, first, state_of)
    others = "; the other ranks wait" if len(finding.ranks) < world_size else ""
    return f"{subject}{reason}{others}"


def _names(finding: HangFinding, world_size: int) -> str:
    first, number = finding.ranks[0], len(finding.ranks)
    process = f" on {first.beat.host} (process {first.beat.pid})" if first.beat else ""
    if number == 1:
        return f"rank {first.rank}{process} has"
    if number == world_size:
        return f"all {world_size} ranks have"
    listed = ", ".join(str(each.rank) for each in finding.ranks[:_NAMED])
    more = f" and {number - _NAMED} more" if number > _NAMED else ""
    return f"ranks {listed}{more}, first of them rank {first.rank}{process}, have"


def _where(beat: Beat | None) -> str:
    if beat is None:
        return "before the first heartbeat"
    mark = beat.mark
    return f"in phase '{mark.phase}' " + ("before the first step" if mark.step is None else f"of step {mark.step}")


def _reason(kind: Kind, seen: Seen, state_of: Callable[[Beat], str | None]) -> str:
    if kind == "failed" and seen.beat:
        return f": it ended with {seen.beat.why}"
    if kind == "quiet":
        return f": {_why_quiet(seen, state_of)}"
    if kind == "behind" and seen.beat and seen.beat.state != RUNNING:
        return ": it has ended, the others have not"
    return ""


def _why_quiet(seen: Seen, state_of: Callable[[Beat], str | None]) -> str:
    if seen.beat is None:
        return "it has not begun, or cannot write its heartbeat"
    state = state_of(seen.beat)
    if state is None:
        return f"no heartbeat for {seen.quiet_s:.0f} s, so it is stopped, dead, cut off, or its interpreter is blocked"
    if state in ("", "Z", "X"):
        return "its process is gone: killed, or out of memory"
    if state in "Tt":
        return "its process is stopped (SIGSTOP, or a debugger)"
    if state == "D":
        return "its process waits in the kernel, as for a file system that does not answer"
    return "its process runs, but its interpreter is blocked, or it cannot write its heartbeat"


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


class ProgressTimeout:
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
        self._stand, self._beats = ProgressTimeout(config, now), Heartbeats(run)
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

    def _find(self) -> HangFinding:
        return find_culprits(self._seen, self._stale_s)

    def _describe(self, finding: HangFinding) -> str:
        return describe_hang(finding, self._world_size, self._stand.stood_s)

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

    def _facts(self, finding: HangFinding, message: str) -> dict[str, object]:
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
        host, namespace = host_and_namespace()
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


# The watchdog of one rank: two threads beside the main one, which tell a run that stands still from one that works.
#
# The heart does all the file work (see `standstill`). The guard does none, so that it ends the process even when the
# file system is what hangs. Neither runs while an extension holds the interpreter's lock: an alarm of the kernel then
# writes the stacks, and the other ranks name this one by the heartbeat that it does not write.

_JOIN_S = 5.0  # how long the end of a run waits for a heart that waits for its file system


class Watchdog:
    """Use it as a context manager around a run, on every rank, and `mark` each phase.

    All ranks mark the same phases in the same order; on a rank that marks nothing for `limit_s` the run is ended with
    `HangError`'s exit code. An error that leaves the block after another rank has found a hang becomes a `HangError`:
    the collectives of a run fail when its ranks end.

    Args:
        run: the run folder; `heartbeats/`, `stacks/` and `hang.json` in it are written.
        rank: this rank.
        world_size: ranks of the run.
        config: the limits.
    """

    def __init__(self, run: Path, rank: int, world_size: int, config: HangConfig) -> None:
        self._run, self._rank, self._world_size, self._config = run, rank, world_size, config
        self._mark = FIRST_MARK
        self._stopped = threading.Event()
        self._why = ""

    def mark(self, phase: str, step: int | None = None) -> None:
        """The main thread is now in this phase, of this step or of the one before if none is given. Costs less than a
        microsecond: files are written by another thread."""
        self._mark = next_mark(self._mark, phase, step)

    def __enter__(self) -> Watchdog:
        self._stacks = StackFile(self._run / "stacks" / f"rank-{self._rank:05d}.txt")
        self._alarm = StackAlarm(self._stacks)
        # A thread that ran late still counts; one that was suspended does not.
        self._longest_s = self._config.beat_s + 2.0
        self._monitor = Monitor(
            self._run, self._rank, self._world_size, self._config, say=say, dump=self._stacks.dump, end=os._exit
        )
        self._threads = [
            threading.Thread(target=target, name=f"watchdog-{target.__name__.strip('_')}", daemon=True)
            for target in (self._heart, self._guard)
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._why = _why(error)
        self._stopped.set()
        for thread in self._threads:
            thread.join(_JOIN_S)
        self._alarm.close()
        verdict = self._monitor.verdict() if self._why else ""
        self._stacks.close()
        if verdict:
            raise HangError(f"this rank ended because of a hang: {verdict}") from error

    def _heart(self) -> None:
        clock, complained = AwakeClock(self._longest_s, time.monotonic), False
        while True:
            stopped = self._stopped.is_set()
            try:
                if stopped:
                    self._monitor.close(self._mark, self._why)
                else:
                    self._monitor.tick(clock.read(), self._mark)
            except Exception as error:  # noqa: BLE001 - it must outlive whatever it finds; the guard ends a hang without it
                if not complained:
                    say(f"warning: the watchdog of rank {self._rank} stumbled: {error!r}")
                complained = True
            if stopped:
                return
            self._stopped.wait(tick_s(self._config))

    def _guard(self) -> None:
        clock = AwakeClock(self._longest_s, time.monotonic)
        stand = ProgressTimeout(self._config, clock.read())
        while not self._stopped.wait(tick_s(self._config)):
            stand.see(clock.read(), self._mark)
            self._alarm.put_off(max(0.5 * stand.limit_s, stand.limit_s - 2 * self._config.beat_s))
            if stand.stood_s >= stand.limit_s + 5 * stale_s(self._config):  # the heart would have ended it before
                self._end_unheard(stand)

    def _end_unheard(self, stand: ProgressTimeout) -> None:
        """Even printing may wait for ever for a file system."""
        step, _, phase, _ = self._mark
        last_words = (
            f"error: rank {self._rank} has stood still for {stand.stood_s:.0f} s in phase '{phase}' of step "
            f"{step}, and cannot report it: does the file system of {self._run} answer?"
        )
        threading.Thread(target=say, args=(last_words,), daemon=True).start()
        time.sleep(1.0)
        os._exit(HangError.exit_code)


def say(text: str) -> None:
    """A line on stderr, past Python's buffers: the main thread may stand still with their lock. Where stderr takes
    none (a log on a full disk) it is lost."""
    clear = "\r\x1b[2K" if os.isatty(2) else ""  # a progress line may stand there
    with suppress(OSError):
        os.write(2, f"{clear}{text}\n".encode(errors="replace"))


def _why(error: BaseException | None) -> str:
    """What a rank failed of; empty when it did not."""
    if error is None or (isinstance(error, SystemExit) and error.code in (None, EXIT_OK, EXIT_RESUME)):
        return ""
    first_line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first_line}"[:300]


class StackFile:
    """Where this process's stacks go. Open from the beginning, because a handler can open nothing; deleted at the end
    if nothing was written. Stacks of an earlier start stay above the new ones."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            say(f"warning: stacks would go to stderr, for {path} cannot be written: {error}")

    def fileno(self) -> int:
        return 2 if self._file is None else self._file.fileno()

    def dump(self, header: str) -> None:
        """The header and the stack of every thread of this process."""
        os.write(self.fileno(), f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {header}\n".encode())
        faulthandler.dump_traceback(self.fileno(), all_threads=True)

    def close(self) -> None:
        if self._file is None:
            return
        try:
            if os.fstat(self._file.fileno()).st_size == 0:
                self._path.unlink(missing_ok=True)
            self._file.close()
        except OSError as error:  # no reason to fail a run that is done
            say(f"warning: {self._path} could not be tidied away: {error}")


class StackAlarm:
    """Writes the stacks by a handler in C when nobody puts it off in time, as when the interpreter is blocked.

    `faulthandler.dump_traceback_later` is not used: while it waits, a forked child that ends hangs. Where SIGALRM is
    already used by somebody else, this does nothing.
    """

    def __init__(self, stacks: StackFile) -> None:
        self._armed = signal.getsignal(signal.SIGALRM) is signal.SIG_DFL and not any(
            signal.getitimer(signal.ITIMER_REAL)
        )
        if self._armed:
            faulthandler.register(signal.SIGALRM, file=stacks.fileno(), all_threads=True, chain=False)

    def put_off(self, seconds: float) -> None:
        """Not before so many seconds from now."""
        if self._armed:
            signal.setitimer(signal.ITIMER_REAL, seconds)

    def close(self) -> None:
        if self._armed:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            faulthandler.unregister(signal.SIGALRM)
            self._armed = False
