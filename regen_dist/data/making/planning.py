"""Planning parts: their sources are looked into by the workers, copies of earlier sources are found, and it is decided
what becomes of each."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from regen_dist.data.dataset.index import VIDEO_EXTENSIONS
from regen_dist.data.dataset.manifest import Skip, listed
from regen_dist.data.dataset.writing import Finished, finished_shards
from regen_dist.data.making.copies import Copies, elsewhere
from regen_dist.data.making.parts import Part, Planned, read_plan, work_of, write_plan
from regen_dist.data.making.plan import BuildOptions
from regen_dist.data.making.probing import Origin, Surveyed, content_of, fetch_again, survey
from regen_dist.data.making.segments import candidates, unsuitable
from regen_dist.data.making.sources import Source
from regen_dist.data.objects.store import Store
from regen_dist.data.pool import Call, Pool
from regen_dist.errors import DataError

UNREADABLE = "unreadable"
_ENOUGH_TO_JUDGE = 20  # unreadable sources in one part, before their share says something


@dataclass
class Begun:
    """A part that workers are looking into. `plan` is there when an earlier build made it; `after` is what of the part
    is finished. Calls by the number of a source in the part: copying it (with why it could not be), hashing it,
    looking into it."""

    part: Part
    origins: list[Origin]
    after: Finished
    plan: list[Planned] | None = None
    copying: dict[int, Call[str]] = field(default_factory=dict)
    hashing: dict[int, Call[str]] = field(default_factory=dict)
    looking: dict[int, Call[Surveyed]] = field(default_factory=dict)


class Planner:
    """Plans the parts of a build, one after the other, in their order.

    Args:
        store: of the dataset.
        parts: all of the build, whoever makes them.
        max_bad_share: of sources that cannot be read, in a part.
        tell: called with how many sources are done.
    """

    def __init__(
        self,
        store: Store,
        parts: Sequence[Part],
        options: BuildOptions,
        pool: Pool,
        copies: Copies,
        max_bad_share: float,
        tell: Callable[[int], None],
    ) -> None:
        self._store, self._options, self._pool, self._copies = store, options, pool, copies
        self._max_bad_share, self._tell = max_bad_share, tell
        self._originals = Originals(store, parts, pool)
        self._threshold = options.scene_threshold if options.scenes else None

    def begin(self, part: Part) -> Begun:
        """Let the workers look into the sources of a part, or bring those of a part that is planned already."""
        self._copies.make_room(part)
        begun = Begun(part, self._copies.origins(part), finished_shards(self._store, part.stem))
        if self._store.size(part.plan_name) is not None:
            begun.plan = read_plan(self._store, part)
            for number in {work.source for work in work_of(part, begun.plan, begun.after.units) if work.segments}:
                origin, content = begun.origins[number], begun.plan[number].content
                begun.copying[number] = self._pool.submit(fetch_again, origin, content)
            return begun
        for number, origin in enumerate(begun.origins):
            if self._originals.before(part.first + number):
                begun.hashing[number] = self._pool.submit(content_of, origin, True)
            else:
                begun.looking[number] = self._pool.submit(survey, origin, self._threshold)
        return begun

    def finish(self, begun: Begun) -> list[Planned]:
        """Wait for what was begun, and write the plan; DataError when too much of a part cannot be read."""
        if begun.plan is not None:
            self._tell(len(begun.part.sources))
            return begun.plan
        copied = self._find_copies(begun)
        plan = []
        for number, source in enumerate(begun.part.sources):
            plan.append(copied[number] if number in copied else self._planned(source, begun.looking[number].result()))
            self._tell(1)
        self._guard(begun.part, plan)
        write_plan(self._store, begun.part, plan)
        for number, one in enumerate(plan):
            self._originals.learn(begun.part.first + number, one.content)
        return plan

    def _find_copies(self, begun: Begun) -> dict[int, Planned]:
        """Sources with the content of an earlier one; the others that might have been are looked into now."""
        first, copied = begun.part.first, {}
        for number, call in begun.looking.items():
            if self._originals.after(first + number):
                self._originals.learn(first + number, call.result().content)
        for number, hashing in begun.hashing.items():
            content = hashing.result()
            self._originals.learn(first + number, content)
            original = self._originals.find(first + number, content)
            if original is None:
                begun.looking[number] = self._pool.submit(survey, begun.origins[number], self._threshold)
            else:
                copied[number] = Planned(content, problem=f"duplicate: same content as {original.name}")
        return copied

    def _planned(self, source: Source, found: Surveyed) -> Planned:
        if found.info is None:
            return Planned(found.content, problem=found.problem)
        problem = unsuitable(found.info, self._options) or self._options.sources_left_out.reason(found.notes)
        if self._options.keep and source.suffix[1:] not in VIDEO_EXTENSIONS:
            problem = f"unknown kind: --keep needs a name that ends in one of {', '.join(sorted(VIDEO_EXTENSIONS))}"
        cut = () if problem else tuple(candidates(found.info, found.stretches, self._options))
        return Planned(found.content, found.info, cut, found.caption, problem, found.notes)

    def _guard(self, part: Part, plan: Sequence[Planned]) -> None:
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

    def __init__(self, store: Store, parts: Sequence[Part], pool: Pool) -> None:
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
        """Whether a later source has the same size."""
        return self._by_size.get(self._sources[number].size, (number,))[-1] > number

    def learn(self, number: int, content: str) -> None:
        """Remember a content hash that may be asked for."""
        if self._sources[number].size in self._by_size:
            self._contents[number] = content

    def find(self, number: int, content: str) -> Source | None:
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
                reading[number] = self._pool.submit(content_of, elsewhere(self._sources[number]), False)
        self._contents |= {number: call.result() for number, call in reading.items()}

    def _from_plan(self, number: int) -> None:
        part = self._parts[bisect_right(self._parts, number, key=attrgetter("first")) - 1]
        if part.number in self._plans_read or number in self._contents:
            return
        self._plans_read.add(part.number)
        if self._store.size(part.plan_name) is not None:
            for place, one in enumerate(read_plan(self._store, part)):
                self.learn(part.first + place, one.content)
