"""Which ranks are slow: the time that each waits for data, computes, and takes for a step.

Ranks wait for each other in every step, so the time of a step is nearly the same on all of them. Waiting for data and
the processor's time are a rank's own, and name the one that the others wait for.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import NamedTuple

from regen_dist.distributed.ranks import Ranks

_NAMED = 3
_QUANTITIES = {"data_wait_s": "data wait", "step_s": "step", "cpu_s": "CPU time"}


class RankTimes(NamedTuple):
    """Seconds a step of one rank, on average, and where it is."""

    rank: int
    host: str
    data_wait_s: float
    step_s: float
    cpu_s: float  # of all threads of its process


class RankReport(NamedTuple):
    """Least, median and most over the ranks by name, and the same in words with the slowest ranks."""

    figures: dict[str, float]
    text: str


class RankClock:
    """Times the steps of this rank, from the first on.

    Args:
        ranks: this process's place.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self._host = ranks, socket.gethostname()
        self._clear()

    def _clear(self) -> None:
        self._steps, self._waited, self._stepped, self._computed = 0, 0.0, 0.0, 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        """The block is a step, up to where ranks agree on going on."""
        start, cpu = time.perf_counter(), time.process_time()
        yield
        self._stepped += time.perf_counter() - start
        self._computed += time.process_time() - cpu
        self._steps += 1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time in the block, inside a step, is data wait."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def report(self) -> RankReport:
        """All ranks' steps since the last report. A collective."""
        steps = max(1, self._steps)
        own = (self._waited / steps, self._stepped / steps, self._computed / steps)
        told = self._ranks.gather(RankTimes(self._ranks.rank, self._host, *own))
        self._clear()
        return compared(told)


def compared(times: list[RankTimes]) -> RankReport:
    """The times of all ranks, in numbers and in words."""
    figures: dict[str, float] = {}
    lines = []
    for name, words in _QUANTITIES.items():
        values = [getattr(each, name) for each in times]
        least, middle, most = min(values), median(values), max(values)
        figures |= {f"ranks/{name}_min": least, f"ranks/{name}_median": middle, f"ranks/{name}_max": most}
        worst = sorted(times, key=lambda each: -getattr(each, name))[:_NAMED]
        named = ", ".join(f"rank {each.rank} on {each.host} {getattr(each, name):.3f}" for each in worst)
        lines.append(f"{words} {least:.3f} / {middle:.3f} / {most:.3f} s (most: {named})")
    return RankReport(figures, f"ranks, min / median / max a step: {'; '.join(lines)}")
