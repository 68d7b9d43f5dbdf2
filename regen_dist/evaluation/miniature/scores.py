"""How many readings are right: shares with their intervals, what is taken for what, and the chance level."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np

from regen_dist.data.making.shapes import Attributes
from regen_dist.errors import DataError
from regen_dist.evaluation.shape_reading import Reading

ATTRIBUTES = ("colour", "shape", "direction")
ALL = "all three"
MEASURES = (*ATTRIBUTES, ALL)
TARGETS = {"colour": 0.95, "shape": 0.85, "direction": 0.90, ALL: 0.80}  # shares of the generated videos
LEAST_VIDEOS = 200  # with fewer a share says little
NOTHING = "nothing"  # what a reading of None is called
_QUANTILE = 1.959964  # of the normal distribution, for 95 %

Confusion = dict[str, dict[str, int]]  # what was asked for: what was read: how often


@dataclass(frozen=True)
class Share:
    """`right` of `number`, at least one."""

    right: int
    number: int

    @property
    def value(self) -> float:
        """Between 0 and 1."""
        return self.right / self.number

    def interval(self) -> tuple[float, float]:
        """The 95 % interval of Wilson (1927), which stays inside [0, 1] and is not empty at either end."""
        number, share, z2 = self.number, self.value, _QUANTILE**2
        middle = (share + z2 / (2 * number)) / (1 + z2 / number)
        half = _QUANTILE / (1 + z2 / number) * sqrt(share * (1 - share) / number + z2 / (4 * number**2))
        return max(0.0, middle - half), min(1.0, middle + half)

    def to_json(self) -> dict[str, Any]:
        """Counts, share and interval."""
        return {"right": self.right, "number": self.number, "share": self.value, "interval_95": list(self.interval())}


def score(readings: Sequence[Reading], wanted: Sequence[Attributes]) -> dict[str, Share]:
    """Share of the readings that are right, for each of MEASURES.

    Args:
        readings: of the videos.
        wanted: what each was to show.

    Raises:
        DataError: there are none.
    """
    if not readings:
        raise DataError("there are no videos to score")
    right: Counter[str] = Counter()
    for reading, attributes in zip(readings, wanted, strict=True):
        hits = [name for name in ATTRIBUTES if getattr(reading, name) == getattr(attributes, name)]
        right.update(hits if len(hits) < len(ATTRIBUTES) else MEASURES)
    return {name: Share(right[name], len(readings)) for name in MEASURES}


def confusions(readings: Sequence[Reading], wanted: Sequence[Attributes]) -> dict[str, Confusion]:
    """For each of ATTRIBUTES, how often which value was read where which was wanted."""
    found: dict[str, Confusion] = {name: {} for name in ATTRIBUTES}
    for reading, attributes in zip(readings, wanted, strict=True):
        for name in ATTRIBUTES:
            row = found[name].setdefault(getattr(attributes, name), {})
            read = getattr(reading, name) or NOTHING
            row[read] = row.get(read, 0) + 1
    return found


def derangement(count: int, seed: int = 0) -> list[int]:
    """A fixed order of 0 to `count` - 1, at least 2, in which nothing keeps its place: one cycle (Sattolo, 1986)."""
    random, order = np.random.default_rng(seed), list(range(count))
    for last in range(count - 1, 0, -1):
        other = int(random.integers(last))
        order[last], order[other] = order[other], order[last]
    return order


def missed(scores: dict[str, Share]) -> list[str]:
    """What the generated videos miss of TARGETS, in words; empty when they meet them all."""
    number = scores[ALL].number
    found = [f"{number} videos, at least {LEAST_VIDEOS} are asked for"] if number < LEAST_VIDEOS else []
    return found + [
        f"{name} {scores[name].value:.1%}, the target is {target:.0%}"
        for name, target in TARGETS.items()
        if scores[name].value < target
    ]
