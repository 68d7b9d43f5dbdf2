"""Building a dataset. A build is resumable: what is finished stays, the rest is made, the manifest is last."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from regen_dist.data.dataset.claim import claim
from regen_dist.data.dataset.index import Described
from regen_dist.data.dataset.manifest import MANIFEST, Manifest, Note, Skip, read_manifest, write_manifest
from regen_dist.data.dataset.writing import NewSample, ShardWriter
from regen_dist.data.making.captions import Columns
from regen_dist.data.making.copies import Copies, local_copies
from regen_dist.data.making.parts import Part, Planned, Work, count_units, cut_parts, files_of, work_of, write_done
from regen_dist.data.making.plan import KIND, BuildOptions, identity
from regen_dist.data.making.planning import Begun, Planner
from regen_dist.data.making.sources import Source, find_sources
from regen_dist.data.objects.store import Store, remove_leftovers
from regen_dist.data.pool import Pool, Progress, worker_pool
from regen_dist.data.video.transcode import Encoded, Segment, encode_segments

MAX_BAD_SHARE = 0.5
_IDLE_S = 3600.0  # other tasks may be at work on other machines: what they write is newer than that


class Built(NamedTuple):
    """What a call did: the manifest, or None while parts are left to other tasks; how many shards it made; how many
    parts there are and how many are missing."""

    manifest: Manifest | None
    shards_made: int
    parts: int
    parts_missing: int


def build_shards(
    sources: Sequence[str | Path],
    out: str | Path,
    options: BuildOptions | None = None,
    *,
    captions: str | Path | None = None,
    columns: Columns | None = None,
    task: tuple[int, int] = (0, 1),
    workers: int | None = None,
    max_bad_share: float = MAX_BAD_SHARE,
    progress: Progress = lambda stage, done, total: None,
) -> Built:
    """Make (or finish) the dataset of `sources` at `out`.

    Args:
        sources: video files, folders, prefixes of buckets, and lists (`find_sources`).
        out: folder or URL of the dataset: empty, or begun by the same sources and options.
        captions: a list that gives captions to what is in folders.
        columns: names of the columns of lists (`find_sources`).
        task: (i, n): make the i-th (from 0) of every n parts. The call that finds all parts made writes the manifest.
        workers: processes; all cores by default, 0 works in this process.
        max_bad_share: stop when a larger share of many sources cannot be read.
        progress: called with ("probe", "build" or "parts", done, total).

    Raises:
        DataError: a source is missing, `out` holds something else, or no sample is left.
    """
    options, store = options or BuildOptions(), Store(out)
    found = find_sources(sources, captions, columns)
    parts = cut_parts(found.found, options.part_gb * 1e9)
    claim(store, identity(found, options))
    if store.folder is not None:
        remove_leftovers(store.folder, idle_s=_IDLE_S if task[1] > 1 else 0)
    todo = _unfinished(store, parts[task[0] :: task[1]])
    with local_copies(found.found) as copies, worker_pool(workers) as pool:
        builder = _Builder(store, parts, todo, options, pool, copies, max_bad_share, progress)
        builder.run()
    missing = _missing(store, parts)
    if missing:
        return Built(None, builder.shards_made, len(parts), missing)
    if not todo and store.size(MANIFEST) is not None:
        return Built(read_manifest(store), 0, len(parts), 0)
    indices = [name for _, files in files_of(store, parts) for name in files if name.endswith(".parquet")]
    manifest = write_manifest(store, indices, KIND, options.recorded(), found.skipped)
    return Built(manifest, builder.shards_made, len(parts), 0)


def _missing(store: Store, parts: Sequence[Part]) -> int:
    found = store.list("part-")
    return sum(part.done_name not in found for part in parts)


def _unfinished(store: Store, parts: Sequence[Part]) -> list[Part]:
    """Parts that are not done, or of which something was lost since."""
    found = store.list("part-")
    done = {
        part
        for part, files in files_of(store, [part for part in parts if part.done_name in found])
        if all(found.get(name) == size for name, size in files.items())
    }
    return [part for part in parts if part not in done]


class _Builder:
    """Makes parts one after the other; while one is encoded, the workers look into the sources of the next."""

    def __init__(
        self,
        store: Store,
        parts: Sequence[Part],
        todo: Sequence[Part],
        options: BuildOptions,
        pool: Pool,
        copies: Copies,
        max_bad_share: float,
        progress: Progress,
    ) -> None:
        self._store, self._todo, self._options, self._pool = store, todo, options, pool
        self._copies, self._progress = copies, progress
        self._planner = Planner(store, parts, options, pool, copies, max_bad_share, self._looked)
        self._sources = sum(len(part.sources) for part in todo)
        self._sources_done = self._units = self._units_done = self.shards_made = 0

    def run(self) -> None:
        """Make all parts."""
        begun: list[Begun] = []
        self._looked(0)
        for number, part in enumerate(self._todo):
            self._progress("parts", number, len(self._todo))
            begun.append(self._planner.begin(part))
            if len(begun) > 1:
                self._make(begun.pop(0))
        for last in begun:
            self._make(last)
        if self._todo:
            self._progress("parts", len(self._todo), len(self._todo))

    def _make(self, begun: Begun) -> None:
        part, plan = begun.part, self._planner.finish(begun)
        self._units += count_units(part, plan)
        self._built(begun.after.units)
        with ShardWriter(self._store, part.stem, self._options.limits, begun.after) as writer:
            for work, results in self._results(begun, plan):
                copying = begun.copying.get(work.source)
                lost = copying.result() if copying is not None and work.segments else ""
                self._write(writer, part.sources[work.source], plan[work.source], work, results, lost)
                self._built(len(work.units))
        write_done(self._store, part, plan)
        self._copies.remove(part)
        self.shards_made += writer.made

    def _results(self, begun: Begun, plan: Sequence[Planned]) -> Iterator[tuple[Work, list[Encoded]]]:
        # Whole files are read here, one at a time: through workers several of them would be held in memory.
        pool = Pool(None, 0) if self._options.keep else self._pool
        return pool.run(encode_segments, self._calls(begun, plan))

    def _calls(self, begun: Begun, plan: Sequence[Planned]) -> Iterator[tuple[Work, tuple[object, ...]]]:
        for work in work_of(begun.part, plan, begun.after.units):
            if work.source in begun.copying and work.segments:
                begun.copying[work.source].result()  # where it could not be copied, its segments are left out below
            yield work, (begun.origins[work.source].path, work.segments, self._options.encode)

    def _write(
        self, writer: ShardWriter, source: Source, planned: Planned, work: Work, results: Sequence[Encoded], lost: str
    ) -> None:
        """The units of a piece of work, in order. `lost` says why the source could not be fetched again."""
        encoded = iter(results)
        for unit in work.units:
            if isinstance(unit, Skip):
                writer.skip(unit)
                continue
            result = next(encoded)
            if result.info is None:
                writer.skip(Skip(source=source.name, segment=unit.number, reason=f"damaged: {lost or result.problem}"))
            else:
                for note in planned.notes:
                    writer.note(Note(source=source.name, note=note))
                writer.add(_sample(source, planned, unit, result, self._extension(source)))

    def _extension(self, source: Source) -> str:
        return source.suffix[1:] if self._options.keep else "mp4"

    def _looked(self, sources: int) -> None:
        self._sources_done += sources
        self._progress("probe", self._sources_done, self._sources)

    def _built(self, units: int) -> None:
        self._units_done += units
        self._progress("build", self._units_done, self._units)


def _sample(source: Source, planned: Planned, segment: Segment, result: Encoded, extension: str) -> NewSample:
    assert result.info is not None, "what could be encoded has been looked at"
    info, motion = result.info, planned.candidates[segment.number].motion
    caption = source.caption or planned.caption
    described = Described(info.frames, info.height, info.width, info.fps, source.name, caption, motion)
    return NewSample(segment.key, result.data, described, extension, {"first_frame": segment.start})
