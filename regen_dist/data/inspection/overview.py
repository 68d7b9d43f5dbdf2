"""What a dataset holds, in numbers: counts, histograms, what was left out. Never more than a piece of it in memory."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from regen_dist.data.dataset.catalogue import Dataset
from regen_dist.data.dataset.index import read_index, sample_id
from regen_dist.data.dataset.manifest import Skip, Totals, read_all
from regen_dist.data.inspection.tally import Histogram, Tally

if TYPE_CHECKING:
    from regen_dist.data.pool import Progress

_ROWS_AT_ONCE = 1 << 20
_SIDES = 8  # how many pairs of sides are listed by themselves
_PAIR = 1 << 20  # height * _PAIR + width


@dataclass(frozen=True)
class Overview:
    """The numbers of a dataset.

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
        """As plain values."""
        plain = vars(self) | {"totals": self.totals.model_dump(), "left_out": dict(self.left_out)}
        return plain | {"histograms": {name: shown.to_json() for name, shown in self.histograms.items()}}


def make_overview(dataset: Dataset, progress: Progress = lambda stage, done, total: None) -> Overview:
    """Go through the records of a dataset, and through the texts of its indices one by one.

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
        left_out=tuple(count_reasons(dataset.manifest.skipped)),
        options=dataset.manifest.options,
    )


def count_reasons(skipped: Iterable[Skip]) -> list[tuple[str, int]]:
    """How often each reason occurred, the most frequent first. Reasons that differ in numbers and file names only are
    one; it is told in full where they do not differ at all."""
    groups: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for skip in skipped:
        general = re.sub(r"\S+\.[A-Za-z]\w{1,4}\b", "…", skip.reason)
        groups[re.sub(r"\d+(\.\d+)?", "N", general)][skip.reason] += 1
    counted = [(next(iter(each)) if len(each) == 1 else general, each.total()) for general, each in groups.items()]
    return sorted(counted, key=lambda reason: (-reason[1], reason[0]))


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
    """Captions by their words, and how many different sources there are."""

    def __init__(self, *, count_sources: bool) -> None:
        self.words = Tally()
        self._sources: npt.NDArray[np.int64] | None = np.zeros(0, np.int64) if count_sources else None
        self._new: list[int] = []

    def add(self, table: pa.Table) -> None:
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
