"""The watchdog of one rank: two threads beside the main one, which tell a run that stands still from one that works.

The heart does all the file work (see `standstill`). The guard does none, so that it ends the process even when the
file system is what hangs. Neither runs while an extension holds the interpreter's lock: an alarm of the kernel then
writes the stacks, and the other ranks name this one by the heartbeat that it does not write.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO

from regen_dist.config.keeping import HangConfig
from regen_dist.errors import EXIT_OK, EXIT_RESUME, HangError
from regen_dist.observe.heartbeat import FIRST_MARK, AwakeClock, next_mark
from regen_dist.observe.standstill import Monitor, Standstill, stale_s, tick_s

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
        stand = Standstill(self._config, clock.read())
        while not self._stopped.wait(tick_s(self._config)):
            stand.see(clock.read(), self._mark)
            self._alarm.put_off(max(0.5 * stand.limit_s, stand.limit_s - 2 * self._config.beat_s))
            if stand.stood_s >= stand.limit_s + 5 * stale_s(self._config):  # the heart would have ended it before
                self._end_unheard(stand)

    def _end_unheard(self, stand: Standstill) -> None:
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
