"""Stopping early: a signal, a file or the time sets a flag; the ranks agree on it at a step boundary, save together and
end."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from regen_dist.distributed.ranks import Ranks
from regen_dist.programs import STOP_CHECKED

# The signals that ask a rank to stop, from its first moment to its last. Imports no torch.
#
# A rank imports and builds for many seconds before it trains, and tidies up for some afterwards. A signal
# at such a moment would end it at once, and look like a failure to the process that started it.

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class SignalInbox:
    """Inbox for the first signal; the code that stops the run reads it when it can."""

    def __init__(self) -> None:
        self.first: str | None = None

    def listen(self) -> SignalInbox:
        """Handle the signals from now on to the end of the process, unless others take the handlers meanwhile."""
        for number in SIGNALS:
            signal.signal(number, self._store_first)
        return self

    def close(self) -> None:
        """Ignore the signals from now on, so that none of them ends this process: at exit Python gives up handlers
        early, but leaves ignored signals ignored."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _store_first(self, number: int, _frame: FrameType | None) -> None:
        self.first = self.first or signal.Signals(number).name


_STAT = Path("/proc/self/stat")
_START_TICKS = 19  # the process's start among the fields that follow its name: proc(5), field 22


def process_age_s(stat: Path = _STAT) -> float:
    """Seconds since this process started; 0 if the system does not report it."""
    try:
        fields = stat.read_text().rpartition(")")[2].split()  # the name may hold spaces and brackets
        started_s = int(fields[_START_TICKS]) / os.sysconf("SC_CLK_TCK")
        return max(time.clock_gettime(time.CLOCK_BOOTTIME) - started_s, 0.0)
    except (OSError, AttributeError, IndexError, ValueError):  # no Linux, or a /proc that is not like Linux's
        return 0.0


class Stopper:
    """Collects requests to stop. A handler only sets a flag, without collectives or IO, so a second signal does no
    harm, even while a checkpoint is being written. The first reason stays.

    Used as a context manager, it gives the handlers back that were there before.

    Args:
        run: the run folder.
        time_limit_s: stop when this much time has passed since the process started; None: there is no limit. A
            process that torchrun or a scheduler started again has its time from the beginning.
        lead_s: so much earlier, less than the limit (`TrainConfig` refuses others).
        clock: seconds that go up.
        earlier: signals that came before this began.
        lost: why the run is not this process's any more; empty while it is.
        age_s: age of the process; None asks the system. If it is not known there, time counts from now.
    """

    def __init__(
        self,
        run: Path,
        ranks: Ranks,
        *,
        time_limit_s: float | None = None,
        lead_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        age_s: float | None = None,
        earlier: SignalInbox | None = None,
        lost: Callable[[], str] = lambda: "",
    ) -> None:
        self._file, self._ranks = run / "STOP", ranks
        self._limit_s, self._lead_s, self._clock = time_limit_s, lead_s, clock
        self._started = clock() - (process_age_s() if age_s is None else age_s)
        self.reason: str | None = None
        self._old: tuple[int, int] | None = None
        self._earlier, self._lost = earlier or SignalInbox(), lost

    def __enter__(self) -> Stopper:
        self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        if self._ranks.is_main and STOP_CHECKED not in os.environ:  # else the file has come since then
            self._old = self._remove_old_stop_file()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remove_old_stop_file(self) -> tuple[int, int] | None:
        """Remove the file that asked the previous start to stop; if the disk refuses, remember it as old."""
        try:
            self._file.unlink(missing_ok=True)
        except OSError as error:
            print(f"warning: {self._file} cannot be removed, and is ignored: {error}", file=sys.stderr, flush=True)
        return self._stop_file_id()

    def _stop_file_id(self) -> tuple[int, int] | None:
        """Identify the present file STOP by its inode and modification time; None if there is none."""
        try:
            found = self._file.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self._request_stop(signal.Signals(number).name)

    def _request_stop(self, reason: str) -> None:
        self.reason = self.reason or reason

    def wanted(self) -> bool:
        """Return whether this rank wants to stop. Only rank 0 looks at the file; each rank has a clock of its own."""
        if self._earlier.first:
            self._request_stop(self._earlier.first)
        if self.reason is None and self._ranks.is_main and self._stop_file_id() not in (None, self._old):
            self._request_stop("the file STOP")
        if lost := self._lost():
            self._request_stop(lost)
        limit_s = self._limit_s
        if limit_s is not None and self._clock() - self._started >= limit_s - self._lead_s:
            self._request_stop(f"the time limit of {limit_s:.12g} s")
        return self.reason is not None
