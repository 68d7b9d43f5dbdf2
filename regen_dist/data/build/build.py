"""Building a dataset. A build is resumable: what is finished stays, the rest is made, the manifest is last."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from regen_dist.data.build.lists import Columns
from regen_dist.data.build.plan import (
    BuildPart,
    Copies,
    PlannedSource,
    Planner,
    StartedBuild,
    Work,
    count_units,
    cut_parts,
    files_of,
    local_copies,
    work_of,
    write_done,
)
from regen_dist.data.build.segments import KIND, BuildOptions, build_identity
from regen_dist.data.build.sources import VideoSource, find_sources
from regen_dist.data.format.index import SampleFacts
from regen_dist.data.format.manifest import MANIFEST, DatasetManifest, Note, Skip, claim, read_manifest, write_manifest
from regen_dist.data.format.writing import NewSample, ShardWriter
from regen_dist.data.pool import Pool, Progress, worker_pool
from regen_dist.data.storage.local import remove_leftovers
from regen_dist.data.storage.store import Store
from regen_dist.data.video.transcode import EncodedSegment, Segment, encode_segments

MAX_BAD_SHARE = 0.5
_IDLE_S = 3600.0  # other tasks may be at work on other machines: what they write is newer than that


class Built(NamedTuple):
    """Result of a call: the manifest, or None while other tasks have unfinished parts; the number of shards it made;
    the numbers of all and of missing parts."""

    manifest: DatasetManifest | None
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
    claim(store, build_identity(found, options))
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


def _missing(store: Store, parts: Sequence[BuildPart]) -> int:
    found = store.list("part-")
    return sum(part.done_name not in found for part in parts)


def _unfinished(store: Store, parts: Sequence[BuildPart]) -> list[BuildPart]:
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
        parts: Sequence[BuildPart],
        todo: Sequence[BuildPart],
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
        begun: list[StartedBuild] = []
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

    def _make(self, begun: StartedBuild) -> None:
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

    def _results(
        self, begun: StartedBuild, plan: Sequence[PlannedSource]
    ) -> Iterator[tuple[Work, list[EncodedSegment]]]:
        # Whole files are read here, one at a time: through workers several of them would be held in memory.
        pool = Pool(None, 0) if self._options.keep else self._pool
        return pool.run(encode_segments, self._calls(begun, plan))

    def _calls(self, begun: StartedBuild, plan: Sequence[PlannedSource]) -> Iterator[tuple[Work, tuple[object, ...]]]:
        for work in work_of(begun.part, plan, begun.after.units):
            if work.source in begun.copying and work.segments:
                begun.copying[work.source].result()  # where it could not be copied, its segments are left out below
            yield work, (begun.origins[work.source].path, work.segments, self._options.encode)

    def _write(
        self,
        writer: ShardWriter,
        source: VideoSource,
        planned: PlannedSource,
        work: Work,
        results: Sequence[EncodedSegment],
        lost: str,
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

    def _extension(self, source: VideoSource) -> str:
        return source.suffix[1:] if self._options.keep else "mp4"

    def _looked(self, sources: int) -> None:
        self._sources_done += sources
        self._progress("probe", self._sources_done, self._sources)

    def _built(self, units: int) -> None:
        self._units_done += units
        self._progress("build", self._units_done, self._units)


def _sample(
    source: VideoSource, planned: PlannedSource, segment: Segment, result: EncodedSegment, extension: str
) -> NewSample:
    assert result.info is not None, "what could be encoded has been looked at"
    info, motion = result.info, planned.candidates[segment.number].motion
    caption = source.caption or planned.caption
    described = SampleFacts(info.frames, info.height, info.width, info.fps, source.name, caption, motion)
    return NewSample(segment.key, result.data, described, extension, {"first_frame": segment.start})
