"""Stopping early: a signal or a file sets a flag; the ranks agree on it at a step boundary, save together and end."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

from regen_dist.distributed.ranks import Ranks

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class Stopper:
    """Collects the wish to stop. The handler only sets a flag: no collective, no IO.

    Used as a context manager, it gives the handlers back that were there before.
    """

    def __init__(self, run: Path, ranks: Ranks) -> None:
        self._file, self._ranks = run / "STOP", ranks
        self.reason: str | None = None

    def __enter__(self) -> Stopper:
        self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        if self._ranks.is_main:
            self._file.unlink(missing_ok=True)  # it asked the previous start to stop
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.reason = self.reason or signal.Signals(number).name

    def wanted(self) -> bool:
        """Whether this rank wants to stop. Only rank 0 looks at the file."""
        if self.reason is None and self._ranks.is_main and self._file.exists():
            self.reason = "the file STOP"
        return self.reason is not None
