"""Planning parts: their sources are surveyed by the workers, copies of earlier sources are found, and the use of
each is decided."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from regen_dist.data.build.segments import (
    BuildOptions,
    Candidate,
    Origin,
    SurveyedSource,
    candidates,
    content_of,
    content_to_compare,
    cut_segments,
    fetch_again,
    survey_source,
    unsuitable_reason,
)
from regen_dist.data.build.sources import VideoSource
from regen_dist.data.format.index import VIDEO_EXTENSIONS
from regen_dist.data.format.manifest import Skip, listed, read_all, to_json
from regen_dist.data.format.writing import Finished, finished_shards
from regen_dist.data.pool import Call, Pool
from regen_dist.data.storage.local import free_bytes
from regen_dist.data.storage.store import Store
from regen_dist.data.video.reader import VideoInfo
from regen_dist.data.video.transcode import Segment
from regen_dist.errors import DataError, DiskFull

# Parts of a build: consecutive sources that are planned and made at a time, by whichever task it falls to.
#
# A part has its own shards `part-00000-000000.tar …`. `part-00000.plan.json` keeps what was found in its sources, so
# that a killed build does not survey again; `part-00000.json` is written last and names what the part consists of.

_NEAR_FRAMES = 240  # segments nearer than this are decoded in one pass
_SEGMENTS_AT_ONCE = 8


class BuildPart(NamedTuple):
    """Sources `first`, `first + 1`, … of the build."""

    number: int
    first: int
    sources: tuple[VideoSource, ...]

    @property
    def stem(self) -> str:
        """Return the prefix of the names of its files."""
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
class PlannedSource:
    """Plan for a source. `caption` is the text beside it, `notes` describe the conversion of its frames."""

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


def cut_parts(sources: Sequence[VideoSource], part_bytes: float) -> list[BuildPart]:
    """Consecutive sources, closed by the one that brings a part to `part_bytes`. No task or worker is asked."""
    parts: list[BuildPart] = []
    first, size = 0, 0
    for number, source in enumerate(sources, 1):
        size += source.size
        if size >= part_bytes or number == len(sources):
            parts.append(BuildPart(len(parts), first, tuple(sources[first:number])))
            first, size = number, 0
    return parts


def write_plan(store: Store, part: BuildPart, planned: Sequence[PlannedSource]) -> None:
    """Keep what was found in the sources of a part."""
    rows = [{"name": source.name} | asdict(one) for source, one in zip(part.sources, planned, strict=True)]
    store.put(part.plan_name, to_json({"sources": rows}))


def read_plan(store: Store, part: BuildPart) -> list[PlannedSource]:
    """Read a plan of `write_plan`; raise DataError if it is damaged."""
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
) -> PlannedSource:
    found, cut = VideoInfo(**info) if info else None, tuple(Candidate(*one) for one in candidates)
    return PlannedSource(info=found, candidates=cut, notes=tuple(notes), **rest)


def work_of(part: BuildPart, planned: Sequence[PlannedSource], after: int = 0) -> Iterator[Work]:
    """All that a part takes, in order, without its first `after` units."""
    for number, (source, one) in enumerate(zip(part.sources, planned, strict=True)):
        units = _units(source, one)
        yield from (Work(number, run) for run in _runs(units[after:]))
        after = max(0, after - len(units))


def count_units(part: BuildPart, planned: Sequence[PlannedSource]) -> int:
    """Return the number of samples and skips of a part."""
    return sum(len(_units(source, one)) for source, one in zip(part.sources, planned, strict=True))


def write_done(store: Store, part: BuildPart, planned: Sequence[PlannedSource]) -> None:
    """Name what a finished part consists of: tars and indices with their sizes, the content hash of every source."""
    contents = {source.name: one.content for source, one in zip(part.sources, planned, strict=True)}
    store.put(part.done_name, to_json({"files": store.list(f"{part.stem}-"), "contents": contents}))


def files_of(store: Store, parts: Sequence[BuildPart]) -> Iterator[tuple[BuildPart, dict[str, int]]]:
    """Return the files of finished parts: names and sizes in bytes."""
    by_name = {part.done_name: part for part in parts}
    for name, data in read_all(store, list(by_name)):
        try:
            yield by_name[name], dict(json.loads(data)["files"])
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{store.url}/{name}: damaged; remove it and run the build again") from error


def _units(source: VideoSource, planned: PlannedSource) -> list[Skip | Segment]:
    """Return the units of a source in order: segments to make, and skips with the reason."""
    if planned.info is None or planned.problem:
        return [Skip(source=source.name, reason=planned.problem)]
    return [
        one if isinstance(one, Segment) else Skip(source=source.name, segment=one[0], reason=one[1])
        for one in cut_segments(source.name, planned.content, planned.candidates)
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


# Local copies of sources that are in a bucket: under the system's temporary folder, as long as they are needed.


class Copies:
    """Local copies of the sources of parts.

    Args:
        folder: folder of the copies; None when there is nothing to copy.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._promised: dict[str, int] = {}  # bytes of the parts whose copies are here, or on their way

    def origins(self, part: BuildPart) -> list[Origin]:
        """Return the origin of each source of a part: its location, and the path where it is read."""
        return [self._origin(part, number) for number in range(len(part.sources))]

    def make_room(self, part: BuildPart) -> None:
        """DiskFull when the sources of a part do not fit beside what is there, and what is on its way."""
        needed = sum(source.size for source in part.sources if source.local is None)
        if self._folder is None or not needed:
            return
        here = sum(path.stat().st_size for path in self._folder.rglob("*") if path.is_file())
        free = free_bytes(self._folder) - max(0, sum(self._promised.values()) - here)
        if needed > free:
            raise DiskFull(
                f"{self._folder}: the sources of {part.stem} take {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; "
                "make room, or set TMPDIR to a folder on another disk, or build with a smaller --part-gb"
            )
        self._promised[part.stem] = needed
        self._of(part).mkdir(exist_ok=True)

    def remove(self, part: BuildPart) -> None:
        """Remove the copies of a part's sources."""
        if self._folder is not None:
            shutil.rmtree(self._of(part), ignore_errors=True)
            self._promised.pop(part.stem, None)

    def _of(self, part: BuildPart) -> Path:
        assert self._folder is not None, "there is a folder where something is copied"
        return self._folder / part.stem

    def _origin(self, part: BuildPart, number: int) -> Origin:
        source = part.sources[number]
        path = source.local or self._of(part) / f"{number:06d}{source.suffix}"
        text = None if source.caption else source.text  # that of a list counts: nothing is read in vain
        return Origin(source.folder, source.file, text, path)


def uncopied_origin(source: VideoSource) -> Origin:
    """Origin of a source that is read in place, without a copy."""
    return Origin(source.folder, source.file, source.text, source.local or Path(os.devnull) / "none")


@contextmanager
def local_copies(sources: Sequence[VideoSource]) -> Iterator[Copies]:
    """A folder for copies, removed at the end; those that killed builds left are removed at the start."""
    if all(source.local is not None for source in sources):
        yield Copies(None)
        return
    root = Path(tempfile.gettempdir()) / f"regen-sources-{os.getuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    with _locked(root):
        for left in root.iterdir():
            _remove_unless_used(left)
        folder = Path(tempfile.mkdtemp(dir=root))
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    try:
        yield Copies(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_unless_used(folder: Path) -> None:
    """A build holds a lock on its folder; the system drops it with the process."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(descriptor)


UNREADABLE = "unreadable"
_ENOUGH_TO_JUDGE = 20  # unreadable sources in one part, before their share says something


@dataclass
class StartedBuild:
    """A part whose sources are being surveyed. `plan` is set if an earlier build made it; `after` is the finished share
    of it. Calls by the number of a source in the part: copying it (with the reason of a failure), hashing it,
    surveying it."""

    part: BuildPart
    origins: list[Origin]
    after: Finished
    plan: list[PlannedSource] | None = None
    copying: dict[int, Call[str]] = field(default_factory=dict)
    hashing: dict[int, Call[str]] = field(default_factory=dict)
    surveys: dict[int, Call[SurveyedSource]] = field(default_factory=dict)


class Planner:
    """Plans the parts of a build, one after the other, in their order.

    Args:
        store: store of the dataset.
        parts: all of the build, whoever makes them.
        max_bad_share: largest share of a part's sources that may be unreadable.
        report_progress: called with the number of sources that are done.
    """

    def __init__(
        self,
        store: Store,
        parts: Sequence[BuildPart],
        options: BuildOptions,
        pool: Pool,
        copies: Copies,
        max_bad_share: float,
        report_progress: Callable[[int], None],
    ) -> None:
        self._store, self._options, self._pool, self._copies = store, options, pool, copies
        self._max_bad_share, self._report_progress = max_bad_share, report_progress
        self._originals = Originals(store, parts, pool)
        self._threshold = options.scene_threshold if options.scenes else None

    def begin(self, part: BuildPart) -> StartedBuild:
        """Let the workers survey the sources of a part, or bring those of a part that is planned already."""
        self._copies.make_room(part)
        begun = StartedBuild(part, self._copies.origins(part), finished_shards(self._store, part.stem))
        if self._store.size(part.plan_name) is not None:
            begun.plan = read_plan(self._store, part)
            for number in {work.source for work in work_of(part, begun.plan, begun.after.units) if work.segments}:
                origin, content = begun.origins[number], begun.plan[number].content
                begun.copying[number] = self._pool.submit(fetch_again, origin, content)
            return begun
        for number, origin in enumerate(begun.origins):
            if self._originals.before(part.first + number):
                begun.hashing[number] = self._pool.submit(content_to_compare, origin)
            else:
                begun.surveys[number] = self._pool.submit(survey_source, origin, self._threshold)
        return begun

    def finish(self, begun: StartedBuild) -> list[PlannedSource]:
        """Wait for what was begun, and write the plan; DataError when too much of a part cannot be read."""
        if begun.plan is not None:
            self._report_progress(len(begun.part.sources))
            return begun.plan
        copied = self._find_copies(begun)
        plan = []
        for number, source in enumerate(begun.part.sources):
            plan.append(copied[number] if number in copied else self._planned(source, begun.surveys[number].result()))
            self._report_progress(1)
        self._guard(begun.part, plan)
        write_plan(self._store, begun.part, plan)
        for number, one in enumerate(plan):
            self._originals.learn(begun.part.first + number, one.content)
        return plan

    def _find_copies(self, begun: StartedBuild) -> dict[int, PlannedSource]:
        """Sources with the content of an earlier one; the others that might have been are surveyed now."""
        first, copied = begun.part.first, {}
        for number, call in begun.surveys.items():
            if self._originals.after(first + number):
                self._originals.learn(first + number, call.result().content)
        for number, hashing in begun.hashing.items():
            content = hashing.result()
            self._originals.learn(first + number, content)
            original = self._originals.find(first + number, content)
            if original is None:
                begun.surveys[number] = self._pool.submit(survey_source, begun.origins[number], self._threshold)
            else:
                mine, theirs = (one.caption or one.text_mark for one in (begun.part.sources[number], original))
                lost = "; its own caption is left out" if mine and mine != theirs else ""
                copied[number] = PlannedSource(content, problem=f"duplicate: same content as {original.name}{lost}")
        return copied

    def _planned(self, source: VideoSource, found: SurveyedSource) -> PlannedSource:
        if found.info is None:
            return PlannedSource(found.content, problem=found.problem)
        problem = unsuitable_reason(found.info, self._options) or self._options.sources_left_out.reason(found.notes)
        if self._options.keep and source.suffix[1:] not in VIDEO_EXTENSIONS:
            problem = f"unknown kind: --keep needs a name that ends in one of {', '.join(sorted(VIDEO_EXTENSIONS))}"
        cut = () if problem else tuple(candidates(found.info, found.stretches, self._options))
        return PlannedSource(found.content, found.info, cut, found.caption, problem, found.notes)

    def _guard(self, part: BuildPart, plan: Sequence[PlannedSource]) -> None:
        bad = [
            Skip(source=source.name, reason=one.problem)
            for source, one in zip(part.sources, plan, strict=True)
            if one.problem.startswith(f"{UNREADABLE}:")
        ]
        if len(bad) >= _ENOUGH_TO_JUDGE and len(bad) > self._max_bad_share * len(plan):
            raise DataError(
                f"{len(bad)} of {len(plan)} sources in {part.stem} cannot be read, more than --max-bad-share "
                f"{self._max_bad_share:g} allows; look at the sources, or allow more:\n{listed(bad)}"
            )


class Originals:
    """Finds the first source with some content. Only sources of equal size can be equal, so only those are read, and
    only when no plan says their hash."""

    def __init__(self, store: Store, parts: Sequence[BuildPart], pool: Pool) -> None:
        self._store, self._parts, self._pool = store, parts, pool
        self._sources = [source for part in parts for source in part.sources]
        self._contents: dict[int, str] = {}
        self._plans_read: set[int] = set()
        by_size: dict[int, list[int]] = defaultdict(list)
        for number, source in enumerate(self._sources):
            by_size[source.size].append(number)
        self._by_size = {size: numbers for size, numbers in by_size.items() if len(numbers) > 1}

    def before(self, number: int) -> Sequence[int]:
        """Earlier sources of the same size."""
        same_size = self._by_size.get(self._sources[number].size, [])
        return same_size[: bisect_left(same_size, number)]

    def after(self, number: int) -> bool:
        """Return true if a later source has the same size."""
        return self._by_size.get(self._sources[number].size, (number,))[-1] > number

    def learn(self, number: int, content: str) -> None:
        """Remember a content hash that may be asked for."""
        if self._sources[number].size in self._by_size:
            self._contents[number] = content

    def find(self, number: int, content: str) -> VideoSource | None:
        """The first source before this one with the same content."""
        before = self.before(number)
        self._read(other for other in before if other not in self._contents)
        same = (other for other in before if content and self._contents[other] == content)
        return next((self._sources[other] for other in same), None)

    def _read(self, numbers: Iterator[int]) -> None:
        """Hashes from the plans of their parts, else of their bytes."""
        reading: dict[int, Call[str]] = {}
        for number in numbers:
            self._from_plan(number)
            if number not in self._contents:
                reading[number] = self._pool.submit(content_of, uncopied_origin(self._sources[number]), False)
        self._contents |= {number: call.result() for number, call in reading.items()}

    def _from_plan(self, number: int) -> None:
        part = self._parts[bisect_right(self._parts, number, key=attrgetter("first")) - 1]
        if part.number in self._plans_read or number in self._contents:
            return
        self._plans_read.add(part.number)
        if self._store.size(part.plan_name) is not None:
            for place, one in enumerate(read_plan(self._store, part)):
                self.learn(part.first + place, one.content)
