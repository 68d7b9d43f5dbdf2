"""Hang detection of a rank: heartbeats, a warning, and at the time limit a report, stack dumps and the end of the run.

Normally a rank only writes its own heartbeat. It reads the others' heartbeats once its own main thread has made no
progress for long. To spare the file system, only the deputies read those of all ranks: ranks 0 to 7 and every power of
two, which are on different hosts. The lowest live deputy writes the report.
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
    replace_file,
    write_beat,
)

# --- finding the rank that the others wait for, from the heartbeats of all ranks ---

Kind = Literal["failed", "quiet", "behind", "together"]
_NAMED = 8  # number of ranks that a message lists


class HangFinding(NamedTuple):
    """Ranks that the others wait for, and how they differ from the others.

    failed: they ended with an error. quiet: they write no heartbeat. behind: they are in an earlier phase. together:
    no difference was found; these are all ranks that still run.
    """

    kind: Kind
    ranks: tuple[Seen, ...]


def find_blocking_ranks(seen: Sequence[Seen], stale_s: float) -> HangFinding:
    """Find the ranks that block the others: first failed ones, then those without a heartbeat for `stale_s`, then those
    behind.

    Ranks mark the same phases in the same order, so the smallest (steps begun, phase index in the step) is behind. A
    rank that has ended normally is ahead of the others in its last step.
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
    """Describe a finding in one sentence that names rank, host, process, phase and step.

    Args:
        finding: result of `find_blocking_ranks`.
        world_size: number of ranks of the run.
        stood_s: time that the observer has waited.
        state_of: returns the state letter of a process, "" if it is gone, None if it cannot be determined here.
    """
    first = finding.ranks[0]
    waited_s = max(stood_s, first.beat.stood_s) if first.beat else stood_s
    basis = " by its last heartbeat" if finding.kind == "quiet" and first.beat else ""  # its mark may be slightly newer
    subject = f"{_names(finding, world_size)} stood still for {waited_s:.0f} s {_where(first.beat)}{basis}"
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
    return f"in phase '{beat.last_phase}' " + ("before the first step" if beat.step is None else f"of step {beat.step}")


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
    """Return the polling interval of the watchdog threads."""
    return min(config.beat_s, 1.0)


def stale_s(config: HangConfig) -> float:
    """Return the time after which an unchanged heartbeat counts as stale."""
    return 3 * config.beat_s + 1.0


def is_deputy(rank: int) -> bool:
    """Return true if this rank reads the heartbeats of all others when the run makes no progress."""
    return rank < _FIRST_DEPUTIES or rank & (rank - 1) == 0


class ProgressTimeout:
    """Time since the main thread's last mark, with its limit. Until the first step is complete the start limit applies:
    models are built, state is loaded, and the first step compiles kernels."""

    def __init__(self, config: HangConfig, now: float) -> None:
        self._config, self._since = config, now
        self._mark: Marked | None = None
        self.starting = True
        self.stood_s = 0.0

    def see(self, now: float, mark: Marked) -> float | None:
        """Record the newest mark. If it is a new one, return the duration of the previous one in seconds."""
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
        """Return the warning limit, scaled at the start in proportion to the start limit."""
        return self._config.warn_s * self.limit_s / self._config.limit_s

    @property
    def limit_key(self) -> str:
        return "guards.hang.start_limit_s" if self.starting else "guards.hang.limit_s"


class Monitor:
    """Hang detector of one rank, without threads: its owner calls `tick` every `tick_s`.

    Args:
        run: the run folder.
        rank: this rank.
        world_size: number of ranks of the run.
        config: the limits.
        print_line: prints a line for the user.
        dump: writes this process's stacks below the given header line.
        end: ends this process with the given exit code; does not return.
        now: start time on the clock of `tick`.
    """

    def __init__(
        self,
        run: Path,
        rank: int,
        world_size: int,
        config: HangConfig,
        *,
        print_line: Callable[[str], None],
        dump: Callable[[str], None],
        end: Callable[[int], None],
        now: float = 0.0,
    ) -> None:
        self._run, self._rank, self._world_size, self._config = run, rank, world_size, config
        self._print_line, self._dump, self._end = print_line, dump, end
        self._stand, self._beats = ProgressTimeout(config, now), Heartbeats(run)
        self._stale_s, self._tick_s = stale_s(config), tick_s(config)
        self._moment_s = 2 * self._tick_s + 1.0  # time until other ranks see what this one has written
        self._next_beat = self._next_read = now
        self._number, self._cannot_write = 0, False
        self._beat: Beat | None = None
        self._seen: list[Seen] = []
        self._considered = self._warned = False
        self._leave_at: float | None = None
        self._old = self._clear_earlier_start()

    def tick(self, now: float, mark: Marked) -> None:
        """Write the heartbeat if it is due, and check the time since the main thread's newest mark."""
        lasted_s = self._stand.see(now, mark)
        if lasted_s is not None:
            self._report_recovery(lasted_s)
        if now >= self._next_beat:
            self._next_beat = now + self._config.beat_s
            self._write(self._beat_now(mark))
        if self._leave_at is not None:
            if now >= self._leave_at:
                self._end(HangError.exit_code)
        elif self._stand.stood_s >= min(2 * self._config.beat_s, self._stand.warn_s):
            self._check_progress(now, mark)

    def close(self, mark: Marked, why: str = "") -> None:
        """Write the last heartbeat: this rank has ended, normally or for the given reason."""
        self._write(self._beat_now(mark).ending(why))

    def reported_hang(self) -> str:
        """Return the report of a hang in this start of the run; empty if there is none."""
        text = read_text(self._run / "hang.json")
        if not text or text == self._old:
            return ""
        try:
            return str(json.loads(text)["message"])
        except (ValueError, KeyError, TypeError):
            return f"{self._run / 'hang.json'} cannot be read"

    # --- detection ---

    def _check_progress(self, now: float, mark: Marked) -> None:
        stood_s, limit_s, warn_s = self._stand.stood_s, self._stand.limit_s, self._stand.warn_s
        if message := self.reported_hang():
            self._leave(now, message, speak=self._rank == 0)
            return
        self._read_others(now, mark)
        if stood_s >= limit_s + self._wait_s():
            self._report_hang(now, mark)
        elif warn_s <= stood_s < limit_s and not self._considered and is_deputy(self._rank):
            self._considered = True
            if not self._lower_deputy_waits():
                self._warned = True
                left_s = limit_s - stood_s
                self._print_line(
                    f"warning: {self._describe(self._find())}; the run is ended if nothing moves for {left_s:.0f} s"
                )

    def _wait_s(self) -> float:
        """Return how long after the limit this rank waits for another rank's report."""
        if not is_deputy(self._rank):
            return 2 * self._stale_s
        return self._moment_s if self._lower_deputy_waits() else 0.0

    def _read_others(self, now: float, mark: Marked) -> None:
        """Read the heartbeats of all ranks: deputies some time before the limit, the others if no deputy reports."""
        stood_s, ahead_s = self._stand.stood_s, 2 * self._stale_s
        if is_deputy(self._rank):
            before_warning = not self._considered and stood_s >= self._stand.warn_s - ahead_s
            needed = before_warning or stood_s >= self._stand.limit_s - ahead_s
        else:
            needed = stood_s >= self._stand.limit_s + self._moment_s
        if needed and now >= self._next_read:
            self._next_read = now + self._config.beat_s
            self._seen = self._read_heartbeats(now, mark)

    def _read_heartbeats(self, now: float, mark: Marked) -> list[Seen]:
        return [
            Seen(rank, self._beat_now(mark), 0.0) if rank == self._rank else self._beats.read(rank, now)
            for rank in range(self._world_size)
        ]

    def _lower_deputy_waits(self) -> bool:
        """Return true if a lower deputy is alive and waiting too."""
        return any(
            each.beat is not None
            and each.beat.state == RUNNING
            and each.quiet_s < self._stale_s
            and each.beat.stood_s >= self._stand.warn_s / 2
            for each in self._seen[: self._rank]
            if is_deputy(each.rank)
        )

    def _find(self) -> HangFinding:
        return find_blocking_ranks(self._seen, self._stale_s)

    def _describe(self, finding: HangFinding) -> str:
        return describe_hang(finding, self._world_size, self._stand.stood_s)

    # --- reporting ---

    def _report_hang(self, now: float, mark: Marked) -> None:
        self._seen = self._read_heartbeats(now, mark)
        finding = self._find()
        message = (
            f"{self._describe(finding)}. The run is ended; the stacks of its ranks are in {self._run / 'stacks'}. "
            "The same command goes on from the newest checkpoint. If this phase may last so long, raise "
            f"{self._stand.limit_key} (now {self._stand.limit_s:g})"
        )
        self._dump(f"rank {self._rank}: {message}")
        try:
            replace_file(self._run / "hang.json", json_text(self._facts(finding, message), indent=1) + "\n")
        except OSError as error:
            self._warn_once(error)
        self._leave(now, message, speak=True, dumped=True)

    def _facts(self, finding: HangFinding, message: str) -> dict[str, object]:
        ranks: list[dict[str, object]] = []
        for rank, beat, quiet_s in finding.ranks:
            ranks.append({"rank": rank, "quiet_s": round(quiet_s, 3)})
            if beat is not None:
                ranks[-1] |= {name: getattr(beat, name) for name in ("host", "pid", "why", "stood_s", "step")}
                ranks[-1]["phase"] = beat.last_phase
        return {"message": message, "kind": finding.kind, "ranks": ranks, "by": self._rank, "written": time.time()}

    def _leave(self, now: float, message: str, *, speak: bool, dumped: bool = False) -> None:
        """Dump the stacks and end shortly after, so that the others have time to see the report."""
        if not dumped:
            self._dump(f"rank {self._rank}: {message}")
        if speak:
            self._print_line(f"error: {message}")
        self._leave_at = now + self._moment_s

    def _report_recovery(self, lasted_s: float) -> None:
        if self._warned and self._leave_at is None:
            self._print_line(f"the run goes on after it stood still for {lasted_s:.0f} s")
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
            self._warn_once(error)

    def _warn_once(self, error: OSError) -> None:
        """Warn once that a heartbeat cannot be written: a full disk must not end a working run."""
        if not self._cannot_write:
            self._cannot_write = True
            self._print_line(f"warning: rank {self._rank} cannot write its heartbeat and goes on without: {error}")

    def _clear_earlier_start(self) -> str:
        """Return the report of an earlier start; rank 0 deletes it and the old heartbeats.

        A rank that started before rank 0 writes its file again with its next heartbeat.
        """
        old = read_text(self._run / "hang.json")
        if self._rank == 0:
            try:
                if old:
                    os.replace(self._run / "hang.json", self._run / "hang-previous.json")
                for path in beat_path(self._run, 0).parent.glob("rank-*"):
                    path.unlink(missing_ok=True)
            except OSError as error:
                self._warn_once(error)
        return old


# --- watchdog of one rank: two threads beside the main one ---
#
# The heartbeat thread does all file access. The guard thread does none, so that it can end the process even if the file
# system hangs. Neither runs while an extension holds the interpreter lock: then a kernel alarm writes the stacks, and
# the other ranks identify this one by its missing heartbeat.

_JOIN_S = 5.0  # how long the end of a run waits for a heartbeat thread that is blocked by its file system


class Watchdog:
    """Context manager around a run on every rank, whose phases the main thread reports with `mark`.

    All ranks mark the same phases in the same order; if a rank marks nothing for `limit_s`, the run is ended with
    `HangError`'s exit code. An error that leaves the block after another rank has found a hang becomes a `HangError`,
    because collectives fail when other ranks end.

    Args:
        run: the run folder, where `heartbeats/`, `stacks/` and `hang.json` are written.
        rank: this rank.
        world_size: number of ranks of the run.
        config: the limits.
    """

    def __init__(self, run: Path, rank: int, world_size: int, config: HangConfig) -> None:
        self._run, self._rank, self._world_size, self._config = run, rank, world_size, config
        self._mark = FIRST_MARK
        self._stopped = threading.Event()
        self._why = ""

    def mark(self, phase: str, step: int | None = None) -> None:
        """Record that the main thread enters a phase, of this step or of the previous one if none is given. Takes less
        than a microsecond: files are written by another thread."""
        self._mark = next_mark(self._mark, phase, step)

    def __enter__(self) -> Watchdog:
        self._stacks = StackFile(self._run / "stacks" / f"rank-{self._rank:05d}.txt")
        self._alarm = StackAlarm(self._stacks)
        # The time of a late tick counts; that of a suspended process does not.
        self._longest_s = self._config.beat_s + 2.0
        self._monitor = Monitor(
            self._run,
            self._rank,
            self._world_size,
            self._config,
            print_line=write_stderr,
            dump=self._stacks.dump,
            end=os._exit,
        )
        self._threads = [
            threading.Thread(target=target, name=f"watchdog-{target.__name__.strip('_')}", daemon=True)
            for target in (self._run_heartbeat, self._run_guard)
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
        reported_hang = self._monitor.reported_hang() if self._why else ""
        self._stacks.close()
        if reported_hang:
            raise HangError(f"this rank ended because of a hang: {reported_hang}") from error

    def _run_heartbeat(self) -> None:
        clock, complained = AwakeClock(self._longest_s, time.monotonic), False
        while True:
            stopped = self._stopped.is_set()
            try:
                if stopped:
                    self._monitor.close(self._mark, self._why)
                else:
                    self._monitor.tick(clock.read(), self._mark)
            except Exception as error:  # noqa: BLE001 - must survive any error; the guard ends a hang without it
                if not complained:
                    write_stderr(f"warning: the watchdog of rank {self._rank} failed and continues: {error!r}")
                complained = True
            if stopped:
                return
            self._stopped.wait(tick_s(self._config))

    def _run_guard(self) -> None:
        clock = AwakeClock(self._longest_s, time.monotonic)
        stand = ProgressTimeout(self._config, clock.read())
        while not self._stopped.wait(tick_s(self._config)):
            stand.see(clock.read(), self._mark)
            self._alarm.postpone(max(0.5 * stand.limit_s, stand.limit_s - 2 * self._config.beat_s))
            if stand.stood_s >= stand.limit_s + 5 * stale_s(
                self._config
            ):  # the heartbeat thread would have ended it before
                self._end_without_files(stand)

    def _end_without_files(self, stand: ProgressTimeout) -> None:
        """End the process without file access; even printing may block forever, so it has a thread of its own."""
        step, _, phase, _ = self._mark
        last_words = (
            f"error: rank {self._rank} has stood still for {stand.stood_s:.0f} s in phase '{phase}' of step "
            f"{step}, and cannot report it: does the file system of {self._run} answer?"
        )
        threading.Thread(target=write_stderr, args=(last_words,), daemon=True).start()
        time.sleep(1.0)
        os._exit(HangError.exit_code)


def write_stderr(text: str) -> None:
    """Write a line to stderr without Python's buffers, whose lock a blocked main thread may hold. If stderr fails (a
    log on a full disk), the line is lost."""
    clear = "\r\x1b[2K" if os.isatty(2) else ""  # clear the progress line
    with suppress(OSError):
        os.write(2, f"{clear}{text}\n".encode(errors="replace"))


def _why(error: BaseException | None) -> str:
    """Return the error of a rank as one line; empty if there is none."""
    if error is None or (isinstance(error, SystemExit) and error.code in (None, EXIT_OK, EXIT_RESUME)):
        return ""
    first_line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first_line}"[:300]


class StackFile:
    """File of this process's stack dumps. Opened at the start, because a signal handler cannot open files; deleted at
    the end if it is empty. Stacks of an earlier start stay above the new ones."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            write_stderr(f"warning: stacks would go to stderr, for {path} cannot be written: {error}")

    def fileno(self) -> int:
        return 2 if self._file is None else self._file.fileno()

    def dump(self, header: str) -> None:
        """Write the header and the stack of every thread of this process, as far as the disk takes them: what comes
        next is the end of the run."""
        with suppress(OSError):
            os.write(self.fileno(), f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {header}\n".encode())
        faulthandler.dump_traceback(self.fileno(), all_threads=True)

    def close(self) -> None:
        if self._file is None:
            return
        try:
            if os.fstat(self._file.fileno()).st_size == 0:
                self._path.unlink(missing_ok=True)
            self._file.close()
        except OSError as error:  # must not fail a finished run
            write_stderr(f"warning: {self._path} could not be tidied away: {error}")


class StackAlarm:
    """Kernel alarm that dumps the stacks from C unless it is postponed in time, for a blocked interpreter.

    `faulthandler.dump_traceback_later` is not used: while it waits, a forked child hangs at its end. If SIGALRM has
    another handler already, this does nothing.
    """

    def __init__(self, stacks: StackFile) -> None:
        self._armed = signal.getsignal(signal.SIGALRM) is signal.SIG_DFL and not any(
            signal.getitimer(signal.ITIMER_REAL)
        )
        if self._armed:
            faulthandler.register(signal.SIGALRM, file=stacks.fileno(), all_threads=True, chain=False)

    def postpone(self, seconds: float) -> None:
        """Set the alarm to this many seconds from now."""
        if self._armed:
            signal.setitimer(signal.ITIMER_REAL, seconds)

    def close(self) -> None:
        if self._armed:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            faulthandler.unregister(signal.SIGALRM)
            self._armed = False
