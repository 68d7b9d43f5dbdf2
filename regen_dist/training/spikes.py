"""Loss spikes: when the loss of several steps in a row is far above that of the steps before."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import median
from typing import Any

from regen_dist.config.keeping import SpikeConfig

# The median absolute deviation times this is the standard deviation, where the values are normally distributed.
_STD_OF_MAD = 1.4826

# The least spread that a window is taken to have, as a share of its median. A window of nearly equal losses (a plateau,
# few clips seen again and again) has a MAD of about 0, and any noise would be many of those away. With the default
# threshold of 10 this lets pass 10 % above the median at least; spikes that harm a run are several times the median.
_LEAST_SPREAD = 0.01


@dataclass(frozen=True)
class Spike:
    """Suspicious steps in a row, as many as `guards.spike.patience`.

    `first_step` is the first of them, `last_step` the newest; a checkpoint of a step before the first is from before
    the spike. `loss` is that of the last step, `median` and `limit` are what it was compared with.
    """

    first_step: int
    last_step: int
    loss: float
    median: float
    limit: float

    def __str__(self) -> str:
        return (
            f"loss spike in steps {self.first_step} to {self.last_step}: the loss is {self.loss:.6g}, "
            f"the median before was {self.median:.6g}, and up to {self.limit:.6g} is usual"
        )


class SpikeGuard:
    """Judges the global mean loss of each step. It is the same number on every rank, so all ranks decide alike.

    Batches of different kinds (images beside clips, other crops) have losses of different levels: each kind has a
    window of its own, the newest `window` losses of it that were finite and not suspicious. What happens to a loss:

    - It is not finite: nothing at all, as if the step had not been. `NonFiniteGuard` counts those.
    - Its kind's window holds fewer than `least`: it enters the window and is not judged.
    - It is at most median + threshold * spread of the window, where spread is 1.4826 times the median absolute
      deviation, but at least 1 % of the median: it enters the window, and a row of suspicious steps ends here.
    - It is above: the step is suspicious and lengthens the row, over all kinds; the loss does not enter the window.
      The step that makes the row `patience` long is a spike: it is returned, and a new row begins.

    After a spike, by `action`:

    - "warn": every window is emptied. What follows enters them and sets the new level, so a change of level that lasts
      is reported once. Nothing of a kind is judged until `least` of its losses are there again.
    - "rollback": the windows stay as they are; the run goes back, and `restore` puts those of the checkpoint in their
      place.

    With "off" nothing is kept and nothing judged.

    Attributes:
        rollbacks: how often the run went back, over all its starts.
    """

    def __init__(self, config: SpikeConfig) -> None:
        self._config = config
        self._windows: dict[str, deque[float]] = {}
        self._row: list[int] = []  # the suspicious steps in a row
        self.rollbacks = 0

    def judge(self, step: int, loss: float, kind: str = "") -> Spike | None:
        """Take note of the loss of a step; a spike when this step completes one.

        Args:
            step: counted from 1.
            loss: mean over the global batch.
            kind: of the batch, for example "17x64x64".
        """
        if self._config.action == "off" or not isfinite(loss):
            return None
        window = self._windows.setdefault(kind, deque(maxlen=self._config.window))
        if len(window) < self._config.least:
            window.append(loss)
            return None
        middle, limit = usual(window, self._config.threshold)
        if loss <= limit:
            window.append(loss)
            self._row = []
            return None
        self._row.append(step)
        if len(self._row) < self._config.patience:
            return None
        spike = Spike(self._row[0], step, loss, middle, limit)
        self._row = []
        if self._config.action == "warn":
            self._windows = {}
        return spike

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: numbers, lists and names, which JSON gives back bit for bit."""
        windows = {kind: list(window) for kind, window in self._windows.items()}
        return {"windows": windows, "row": list(self._row), "rollbacks": self.rollbacks}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's state and decide as the run that saved it would have; `{}` is a fresh start."""
        windows = {} if self._config.action == "off" else state.get("windows", {})
        self._windows = {kind: deque(losses, maxlen=self._config.window) for kind, losses in windows.items()}
        self._row = list(state.get("row", []))
        self.rollbacks = state.get("rollbacks", 0)


def usual(losses: Sequence[float], threshold: float) -> tuple[float, float]:
    """The median of some losses, and the highest loss that is still usual beside them."""
    middle = median(losses)
    spread = _STD_OF_MAD * median([abs(loss - middle) for loss in losses])
    return middle, middle + threshold * max(spread, _LEAST_SPREAD * abs(middle))
