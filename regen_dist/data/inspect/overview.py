"""Dataset overview in numbers: counts, histograms, skipped sources; computed in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from regen_dist.data.format.catalogue import Dataset
from regen_dist.data.format.index import read_index, sample_id
from regen_dist.data.format.manifest import Totals, read_all

if TYPE_CHECKING:
    import pyarrow as pa

    from regen_dist.data.pool import Progress


# --- histograms of any number of values: only the count of each (rounded) value is stored ---

_BARS = 10


@dataclass(frozen=True)
class Bar:
    """Bar of a histogram: label and count."""

    label: str
    count: int


class Histogram(NamedTuple):
    """Bars in order, with minimum, median and maximum (None if values have no order)."""

    bars: tuple[Bar, ...]
    low: float | None = None
    median: float | None = None
    high: float | None = None

    def to_json(self) -> dict[str, Any]:
        return self._asdict() | {"bars": [vars(bar) for bar in self.bars]}


class Tally:
    """Incremental counter of values.

    Args:
        decimals: decimals to which values are rounded, which bounds the number of distinct values.
    """

    def __init__(self, decimals: int = 0) -> None:
        self._decimals = decimals
        self._values = np.zeros(0, np.float64)
        self._counts = np.zeros(0, np.int64)

    def add(self, values: npt.NDArray[Any]) -> None:
        new, counts = np.unique(np.round(values.astype(np.float64), self._decimals), return_counts=True)
        self._values, places = np.unique(np.concatenate([self._values, new]), return_inverse=True)
        both = np.concatenate([self._counts, counts])
        self._counts = np.zeros(len(self._values), np.int64)
        np.add.at(self._counts, places.ravel(), both)

    @property
    def total(self) -> int:
        return int(self._counts.sum())

    def quantile(self, share: float) -> float:
        """Return the value at or below which this share of all values lies."""
        place = np.searchsorted(np.cumsum(self._counts), share * self.total)
        return float(self._values[min(int(place), len(self._values) - 1)])

    def histogram(self, *, whole: bool = False) -> Histogram:
        """Return a bar for each value if they are few, else about ten bars of a round width; outliers are merged into
        the first and the last. `whole`: the values are integers."""
        if not self.total:
            return Histogram(())
        if len(self._values) <= _BARS:
            bars = [Bar(f"{value:g}", int(n)) for value, n in zip(self._values, self._counts, strict=True)]
        else:
            bars = self._binned(whole=whole)
        return Histogram(tuple(bars), float(self._values[0]), self.quantile(0.5), float(self._values[-1]))

    def most_frequent(self, most: int, name: Callable[[float], str]) -> Histogram:
        """Return a bar for each of the most frequent values, labelled by `name`, and one for all others."""
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
    """Round up to 1, 2 or 5 times a power of ten."""
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


_ROWS_AT_ONCE = 1 << 20
_SIDES = 8  # how many pairs of sides are listed by themselves
_PAIR = 1 << 20  # height * _PAIR + width


@dataclass(frozen=True)
class Overview:
    """Overview of a dataset.

    `sources` is None where each sample is its own; `captions` counts the samples that have one; `histograms` go by
    what they count; `left_out` pairs reasons with how often they occurred.
    """

    url: str
    kind: str
    shards_url: str | None
    fingerprint: str
    totals: Totals
    sources: int | None
    captions: int
    histograms: dict[str, Histogram]
    left_out: tuple[tuple[str, int], ...]
    options: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        plain = vars(self) | {"totals": self.totals.model_dump(), "left_out": dict(self.left_out)}
        return plain | {"histograms": {name: shown.to_json() for name, shown in self.histograms.items()}}


def make_overview(dataset: Dataset, progress: Progress = lambda stage, done, total: None) -> Overview:
    """Compute the overview from the records of a dataset and the texts of its indices, one by one.

    Args:
        dataset: an opened dataset.
        progress: called with ("inspect", done, total) in shards.
    """
    shapes, texts = _Shapes(), _Texts(count_sources=dataset.manifest.kind != "index")
    for start in range(0, len(dataset), _ROWS_AT_ONCE):
        shapes.add(dataset.records[start : start + _ROWS_AT_ONCE])
    indices = [entry.index for entry in dataset.manifest.shards]
    for done, (_, data) in enumerate(read_all(dataset.store, indices), 1):
        texts.add(read_index(data)[0])
        progress("inspect", done, len(indices))
    histograms = shapes.histograms() | {"caption words": texts.words.histogram(whole=True)}
    return Overview(
        url=dataset.store.url,
        kind=dataset.manifest.kind,
        shards_url=dataset.manifest.shards_url,
        fingerprint=dataset.fingerprint,
        totals=dataset.manifest.totals,
        sources=texts.sources,
        captions=texts.words.total,
        histograms={name: shown for name, shown in histograms.items() if shown.bars},
        left_out=tuple(dataset.manifest.reasons().items()),
        options=dataset.manifest.options,
    )


class _Shapes:
    def __init__(self) -> None:
        self.frames, self.short, self.sides, self.fps, self.motion = Tally(), Tally(), Tally(), Tally(2), Tally(2)

    def add(self, records: npt.NDArray[np.void]) -> None:
        height, width = records["height"].astype(np.int64), records["width"].astype(np.int64)
        self.frames.add(records["frames"])
        self.short.add(np.minimum(height, width))
        self.sides.add(height * _PAIR + width)
        self.fps.add(records["fps"])
        self.motion.add(records["motion"][~np.isnan(records["motion"])])

    def histograms(self) -> dict[str, Histogram]:
        return {
            "frames": self.frames.histogram(whole=True),
            "short side": self.short.histogram(whole=True),
            "height x width": self.sides.most_frequent(_SIDES, lambda pair: f"{pair // _PAIR:.0f}x{pair % _PAIR:.0f}"),
            "fps": self.fps.histogram(),
            "motion": self.motion.histogram(),
        }


class _Texts:
    """Counter of the words of captions and of distinct sources."""

    def __init__(self, *, count_sources: bool) -> None:
        self.words = Tally()
        self._sources: npt.NDArray[np.int64] | None = np.zeros(0, np.int64) if count_sources else None
        self._new: list[int] = []

    def add(self, table: pa.Table) -> None:
        import pyarrow.compute as pc

        captions = pc.utf8_trim_whitespace(table["caption"].drop_null())
        self.words.add(pc.list_value_length(pc.utf8_split_whitespace(captions)).to_numpy())
        if self._sources is not None:
            self._new += [sample_id(source) for source in pc.unique(table["source"]).to_pylist()]
            if len(self._new) > _ROWS_AT_ONCE:
                self._sources, self._new = np.union1d(self._sources, np.array(self._new)), []

    @property
    def sources(self) -> int | None:
        if self._sources is None:
            return None
        return len(np.union1d(self._sources, np.array(self._new, np.int64)))
