"""Histograms of any number of values: how often each (rounded) value occurs is all that is kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

_BARS = 10


@dataclass(frozen=True)
class Bar:
    """One bar: what it counts, and how many."""

    label: str
    count: int


class Histogram(NamedTuple):
    """Bars in order, and the lowest, the median and the highest value (None where values have no order)."""

    bars: tuple[Bar, ...]
    low: float | None = None
    median: float | None = None
    high: float | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return self._asdict() | {"bars": [vars(bar) for bar in self.bars]}


class Tally:
    """Counts values as they come.

    Args:
        decimals: values are rounded to so many, which bounds how many different ones there can be.
    """

    def __init__(self, decimals: int = 0) -> None:
        self._decimals = decimals
        self._values = np.zeros(0, np.float64)
        self._counts = np.zeros(0, np.int64)

    def add(self, values: npt.NDArray[Any]) -> None:
        """Count some more values [N]."""
        new, counts = np.unique(np.round(values.astype(np.float64), self._decimals), return_counts=True)
        self._values, places = np.unique(np.concatenate([self._values, new]), return_inverse=True)
        both = np.concatenate([self._counts, counts])
        self._counts = np.zeros(len(self._values), np.int64)
        np.add.at(self._counts, places.ravel(), both)

    @property
    def total(self) -> int:
        """How many values were counted."""
        return int(self._counts.sum())

    def quantile(self, share: float) -> float:
        """The value below or at which this share of all lies."""
        place = np.searchsorted(np.cumsum(self._counts), share * self.total)
        return float(self._values[min(int(place), len(self._values) - 1)])

    def histogram(self, *, whole: bool = False) -> Histogram:
        """A bar for each value where they are few, else some ten bars of a round width; what lies far out is put
        together in the first and the last. `whole`: the values are whole numbers."""
        if not self.total:
            return Histogram(())
        if len(self._values) <= _BARS:
            bars = [Bar(f"{value:g}", int(n)) for value, n in zip(self._values, self._counts, strict=True)]
        else:
            bars = self._binned(whole=whole)
        return Histogram(tuple(bars), float(self._values[0]), self.quantile(0.5), float(self._values[-1]))

    def most_frequent(self, most: int, name: Callable[[float], str]) -> Histogram:
        """A bar for each of the most frequent values, called by `name`, and one for all others."""
        order = np.argsort(-self._counts, kind="stable")
        bars = [Bar(name(float(self._values[place])), int(self._counts[place])) for place in order[:most]]
        others = len(order) - most
        return Histogram(
            tuple(bars + ([Bar(f"{others} others", int(self._counts[order[most:]].sum()))] if others > 0 else []))
        )

    def _binned(self, *, whole: bool) -> list[Bar]:
        low, high = self.quantile(0.01), self.quantile(0.99)
        width = _round_width((high - low) / (_BARS - 1), whole=whole)
        first = math.floor(low / width)
        places = np.clip(np.floor(self._values / width + 1e-9).astype(np.int64) - first, -1, _BARS)
        bars = []
        for place in range(-1, _BARS + 1):
            count = int(self._counts[places == place].sum())
            start = (first + place) * width
            bars.append(Bar(_label(place, start, width, whole=whole), count))
        filled = [number for number, bar in enumerate(bars) if bar.count]
        return bars[filled[0] : filled[-1] + 1]


def _round_width(width: float, *, whole: bool) -> float:
    """The next 1, 2 or 5 times a power of ten."""
    least = 1.0 if whole else 1e-2
    if width <= least:
        return least
    power = 10.0 ** math.floor(math.log10(width))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= width * (1 - 1e-9))


def _label(place: int, start: float, width: float, *, whole: bool) -> str:
    if place == -1:
        return f"below {start + width:.10g}"
    if place == _BARS:
        return f"{start:.10g} and more"
    if whole:
        return f"{start:.10g}" if width == 1 else f"{start:.10g}-{start + width - 1:.10g}"
    return f"{start:.10g}-{start + width:.10g}"
