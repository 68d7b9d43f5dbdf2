"""Parts of a build: consecutive sources that are planned and made at a time, by whichever task it falls to.

A part has its own shards `part-00000-000000.tar …`. `part-00000.plan.json` keeps what was found in its sources, so that
a killed build does not look again; `part-00000.json` is written last and names what the part consists of.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from regen_dist.data.dataset.manifest import Skip, read_all, to_json
from regen_dist.data.making.segments import Candidate, segments
from regen_dist.data.making.sources import Source
from regen_dist.data.objects.store import Store
from regen_dist.data.video.reader import VideoInfo
from regen_dist.data.video.transcode import Segment
from regen_dist.errors import DataError

_NEAR_FRAMES = 240  # segments nearer than this are decoded in one pass
_SEGMENTS_AT_ONCE = 8


class Part(NamedTuple):
    """Sources `first`, `first + 1`, … of the build."""

    number: int
    first: int
    sources: tuple[Source, ...]

    @property
    def stem(self) -> str:
        """How the names of its files begin."""
        return f"part-{self.number:05d}"

    @property
    def plan_name(self) -> str:
        """Name of what was found in its sources."""
        return f"{self.stem}.plan.json"

    @property
    def done_name(self) -> str:
        """Name of the file that is written when all the rest of the part is there."""
        return f"{self.stem}.json"


@dataclass(frozen=True)
class Planned:
    """What will be made of a source. `caption` is what a text beside it says, `notes` how its frames are
    converted."""

    content: str
    info: VideoInfo | None = None
    candidates: tuple[Candidate, ...] = ()
    caption: str | None = None
    problem: str = ""
    notes: tuple[str, ...] = ()


class Work(NamedTuple):
    """Neighbouring units of one source: segments that are decoded in one pass, and what is left out between them.
    `source` counts inside the part."""

    source: int
    units: tuple[Skip | Segment, ...]

    @property
    def segments(self) -> list[Segment]:
        """The units that are to be made."""
        return [unit for unit in self.units if isinstance(unit, Segment)]


def cut_parts(sources: Sequence[Source], part_bytes: float) -> list[Part]:
    """Consecutive sources, closed by the one that brings a part to `part_bytes`. No task or worker is asked."""
    parts: list[Part] = []
    first, size = 0, 0
    for number, source in enumerate(sources, 1):
        size += source.size
        if size >= part_bytes or number == len(sources):
            parts.append(Part(len(parts), first, tuple(sources[first:number])))
            first, size = number, 0
    return parts


def write_plan(store: Store, part: Part, planned: Sequence[Planned]) -> None:
    """Keep what was found in the sources of a part."""
    rows = [{"name": source.name} | asdict(one) for source, one in zip(part.sources, planned, strict=True)]
    store.put(part.plan_name, to_json({"sources": rows}))


def read_plan(store: Store, part: Part) -> list[Planned]:
    """What `write_plan` wrote; DataError when it is damaged."""
    try:
        rows = json.loads(store.get(part.plan_name))["sources"]
        if [row.pop("name") for row in rows] != [source.name for source in part.sources]:
            raise ValueError("it is of other sources")
        return [_planned(**row) for row in rows]
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{store.url}/{part.plan_name}: damaged ({error}); remove it and run the build again"
        ) from error


def _planned(
    info: dict[str, Any] | None,
    candidates: list[tuple[int, int, float | None, str]],
    notes: Sequence[str] = (),
    **rest: Any,
) -> Planned:
    found, cut = VideoInfo(**info) if info else None, tuple(Candidate(*one) for one in candidates)
    return Planned(info=found, candidates=cut, notes=tuple(notes), **rest)


def work_of(part: Part, planned: Sequence[Planned], after: int = 0) -> Iterator[Work]:
    """All that a part takes, in order, without its first `after` units."""
    for number, (source, one) in enumerate(zip(part.sources, planned, strict=True)):
        units = _units(source, one)
        yield from (Work(number, run) for run in _runs(units[after:]))
        after = max(0, after - len(units))


def count_units(part: Part, planned: Sequence[Planned]) -> int:
    """How many samples and skips a part has."""
    return sum(len(_units(source, one)) for source, one in zip(part.sources, planned, strict=True))


def write_done(store: Store, part: Part, planned: Sequence[Planned]) -> None:
    """Name what a finished part consists of: tars and indices with their sizes, the content hash of every source."""
    contents = {source.name: one.content for source, one in zip(part.sources, planned, strict=True)}
    store.put(part.done_name, to_json({"files": store.list(f"{part.stem}-"), "contents": contents}))


def files_of(store: Store, parts: Sequence[Part]) -> Iterator[tuple[Part, dict[str, int]]]:
    """What finished parts consist of: names and sizes in bytes."""
    by_name = {part.done_name: part for part in parts}
    for name, data in read_all(store, list(by_name)):
        try:
            yield by_name[name], dict(json.loads(data)["files"])
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{store.url}/{name}: damaged; remove it and run the build again") from error


def _units(source: Source, planned: Planned) -> list[Skip | Segment]:
    """What becomes of a source, in order: segments to make, and what is left out with the reason."""
    if planned.info is None or planned.problem:
        return [Skip(source=source.name, reason=planned.problem)]
    return [
        one if isinstance(one, Segment) else Skip(source=source.name, segment=one[0], reason=one[1])
        for one in segments(source.name, planned.content, planned.candidates)
    ]


def _runs(units: Sequence[Skip | Segment]) -> Iterator[tuple[Skip | Segment, ...]]:
    """Parted behind eight segments, and where a segment is far from the one before it."""
    run: list[Skip | Segment] = []
    count, stop = 0, 0
    for unit in units:
        if isinstance(unit, Segment):
            if count == _SEGMENTS_AT_ONCE or (count and unit.start > stop + _NEAR_FRAMES):
                yield tuple(run)
                run, count = [], 0
            count, stop = count + 1, unit.stop
        run.append(unit)
    if run:
        yield tuple(run)
