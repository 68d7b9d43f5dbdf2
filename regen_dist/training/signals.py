"""The signals that ask a rank to stop, from its first moment to its last. Imports no torch.

A rank imports and builds for many seconds before it trains, and tidies up for some afterwards. A signal that came then
would end it at once, and look like a failure to whoever started it.
"""

from __future__ import annotations

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class Inbox:
    """Keeps the first signal; whoever stops the run looks at it when it can."""

    def __init__(self) -> None:
        self.first: str | None = None

    def listen(self) -> Inbox:
        """From now on to the end of the process, but for those who take the handlers meanwhile."""
        for number in SIGNALS:
            signal.signal(number, self._keep)
        return self

    def close(self) -> None:
        """From now on nothing ends this process but its own end: Python gives handlers up before it is gone, and
        leaves only what is ignored."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _keep(self, number: int, _frame: FrameType | None) -> None:
        self.first = self.first or signal.Signals(number).name
