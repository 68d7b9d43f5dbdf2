"""Measurements that are compared are taken in turn, over and over, so that what disturbs the machine disturbs them all
alike. Ratios are formed within a round."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Turn:
    """One measurement: `amount` (clips, bytes or samples) in `seconds`, and what else was seen on the way."""

    amount: float
    seconds: float
    facts: Mapping[str, float] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Amount per second."""
        return self.amount / self.seconds


Case = Callable[[], Turn]
Rounds = dict[str, list[Turn]]


def in_turn(
    cases: Mapping[str, Case], repeats: int, told: Callable[[str, Turn], None] = lambda name, turn: None
) -> Rounds:
    """Every case once, then every case again, `repeats` times; `told(name, turn)` hears of each."""
    rounds: Rounds = {name: [] for name in cases}
    for _ in range(repeats):
        for name, case in cases.items():
            turn = case()
            rounds[name].append(turn)
            told(name, turn)
    return rounds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and both ends."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def summary(turns: Sequence[Turn]) -> dict[str, Any]:
    """A case's rate over the rounds, and the medians of what else was seen."""
    facts = {name: median(turn.facts[name] for turn in turns) for name in turns[0].facts}
    return {
        "per_s": spread([turn.rate for turn in turns]),
        "amount": median(turn.amount for turn in turns),
        "seconds": median(turn.seconds for turn in turns),
        **facts,
    }


def ratio(turns: Sequence[Turn], others: Sequence[Turn]) -> dict[str, float]:
    """How many times faster `turns` are than `others`, round by round."""
    return spread([turn.rate / other.rate for turn, other in zip(turns, others, strict=True)])


@contextmanager
def measured(store: int | None) -> Iterator[dict[str, float]]:
    """What the block costs, filled in when it ends: `seconds`; `own_cpu_s`, CPU seconds of this process and of those
    of its workers that live through all of it; `store_cpu_s`, of the process `store`."""
    own = [os.getpid(), *(child.pid for child in multiprocessing.active_children() if child.pid)]
    costs: dict[str, float] = {}
    watched = {"own_cpu_s": own} | ({"store_cpu_s": [store]} if store else {})
    before = {name: sum(map(cpu_seconds, each)) for name, each in watched.items()}
    begun = time.perf_counter()
    yield costs
    costs["seconds"] = time.perf_counter() - begun
    costs |= {name: sum(map(cpu_seconds, each)) - before[name] for name, each in watched.items()}


def turn_of(amount: float, costs: Mapping[str, float], **facts: float) -> Turn:
    """The turn of what `measured` filled in."""
    return Turn(amount, costs["seconds"], {name: costs[name] for name in costs if name != "seconds"} | facts)


def cpu_seconds(process: int) -> float:
    """CPU seconds of a running process so far, all its threads, and its children that have ended."""
    fields = Path(f"/proc/{process}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
