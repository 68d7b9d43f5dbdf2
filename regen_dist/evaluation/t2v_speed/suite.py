"""Training steps per second by where the batches come from, in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

from regen_dist.data.reading.latent_batches import LatentBatch
from regen_dist.evaluation.data_speed.turns import Rounds, Turn, in_turn, measured, ratio, summary, turn_of

CACHE, MEMORY, ENCODER = "latent cache", "the same batches, from memory", "videos, encoded in the loop"
READER = "latent cache, read and let go"
CACHE_TARGET = 0.95
WARM_STEPS = 4  # of each turn, before the clock starts: what was read ahead until then is used up
_TICK_S = 0.01  # no CPU time is known better

Step = Callable[[Iterator[LatentBatch]], None]  # one optimizer step on the batches that come next
Feed = Callable[[], Generator[LatentBatch]]  # begins anew, without end


def compare(
    step: Step, take: Step, feeds: Mapping[str, Feed], *, seconds: float, repeats: int,
    told: Callable[[str, Turn], None],
) -> dict[str, Any]:  # fmt: skip
    """Steps per second of every feed in turn, and the ratios that say what a cache costs and gains; and how fast the
    cache's reader is when nothing is done with what it reads.

    Args:
        step: what is fed.
        take: takes the batches of a step, and does nothing else.
        feeds: named `CACHE`, `MEMORY` and `ENCODER`.
        seconds: of a turn, at least.
        repeats: turns of each.
        told: hears of each turn.
    """
    cases = {name: _case(step, feed, seconds) for name, feed in feeds.items()}
    cases[READER] = _case(take, feeds[CACHE], seconds)
    return section(in_turn(cases, repeats, told))


def section(rounds: Rounds) -> dict[str, Any]:
    """The figures of all turns together. `by_cpu` are the ratios of steps per second of CPU time, over all threads and
    workers: on a machine that others use too they are steadier, and they hide nothing that other cores do."""
    cpu = {name: [by_cpu(turn) for turn in turns] for name, turns in rounds.items()}
    return {
        "unit": "steps",
        "cases": {name: {**summary(turns), "turns": [turn.rate for turn in turns]} for name, turns in rounds.items()},
        "ratios": _against(rounds),
        "by_cpu": _against(cpu),
        "target": CACHE_TARGET,
    }


def by_cpu(turn: Turn) -> Turn:
    """The same work in the CPU time that it took."""
    return Turn(turn.amount, max(turn.facts["own_cpu_s"], _TICK_S), turn.facts)


def _against(rounds: Rounds) -> dict[str, Any]:
    return {other: ratio(rounds[CACHE], rounds[other]) for other in (MEMORY, ENCODER)}


def steps_per_second(step: Step, batches: Generator[LatentBatch], seconds: float) -> Turn:
    """Steps for so long, after a few to warm up; `data_wait` is the share of the time in which they waited for batches.
    Closes the batches."""
    timed = _Timed(batches)
    try:
        for _ in range(WARM_STEPS):
            step(timed)
        timed.waited_s, steps = 0.0, 0
        with measured(None) as costs:
            end = time.perf_counter() + seconds
            while time.perf_counter() < end or not steps:
                step(timed)
                steps += 1
    finally:
        batches.close()
    return turn_of(steps, costs, data_wait=timed.waited_s / costs["seconds"])


def _case(step: Step, feed: Feed, seconds: float) -> Callable[[], Turn]:
    return lambda: steps_per_second(step, feed(), seconds)


class _Timed(Iterator[LatentBatch]):
    """Batches, and how long they were waited for."""

    def __init__(self, batches: Iterator[LatentBatch]) -> None:
        self._batches, self.waited_s = batches, 0.0

    def __next__(self) -> LatentBatch:
        begun = time.perf_counter()
        batch = next(self._batches)
        self.waited_s += time.perf_counter() - begun
        return batch
