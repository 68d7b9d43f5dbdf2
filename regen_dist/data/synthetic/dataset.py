"""Synthetic datasets (`regen shards synthetic`): any number of captioned clips of moving shapes from a seed.

The clips are divided by their numbers into ranges of `samples_per_shard` with separate shards, so the content of a
shard depends on the options only, not on processes, tasks or interruptions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from regen_dist.data.format.index import SCHEMA_VERSION, SampleFacts
from regen_dist.data.format.manifest import DatasetManifest, Kind, claim, write_manifest
from regen_dist.data.format.writing import Finished, NewSample, ShardLimits, ShardWriter, finished_shards, index_name
from regen_dist.data.pool import Pool, Progress, share_of, worker_pool
from regen_dist.data.storage.store import Store
from regen_dist.data.synthetic.shapes import DRAWING_VERSION, SyntheticClip, SyntheticOptions, make_clip
from regen_dist.data.video.transcode import PRESET, X264_PARAMS
from regen_dist.shared_files import IDLE_S, remove_leftovers

KIND: Kind = "synthetic"
_CLIPS_PER_CALL = 16  # clips that a worker makes in one call


class SyntheticResult(NamedTuple):
    """Result of a call: the number of shards it made, and the manifest, or None while other tasks are unfinished."""

    manifest: DatasetManifest | None
    shards_made: int
    samples_missing: int


@dataclass(frozen=True)
class SyntheticRange:
    """Range of clips [start, stop) with separate shards."""

    stem: str
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


def build_synthetic(
    out: str | Path,
    options: SyntheticOptions,
    *,
    task: tuple[int, int] = (0, 1),
    workers: int | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> SyntheticResult:
    """Make (or finish) a dataset of moving shapes at `out`.

    Args:
        out: folder or URL of the dataset: empty, or begun with the same options.
        options: settings of the dataset; together with the code they decide every byte.
        task: (i, n): make the i-th (from 0) of n parts. The call that finishes the last part writes the manifest.
        workers: processes; all cores by default, 0 works in this process.
        progress: called with ("draw", done, total) in clips of this task.

    Raises:
        DataError: `out` holds something else, or there is no such task.
    """
    store, runs = Store(out), _runs(options)
    mine = share_of(runs, task)
    claim(store, _identity(options))
    if store.folder is not None:
        remove_leftovers(store.folder, idle_s=IDLE_S if task[1] > 1 else 0)
    with worker_pool(workers) as pool:
        made = _make_missing(store, mine, options, pool, progress)
    return _finish(store, runs, options, made)


def _finish(store: Store, runs: Sequence[SyntheticRange], options: SyntheticOptions, made: int) -> SyntheticResult:
    """Write the manifest if nothing is missing. Tasks that end together may all do so: it is identical."""
    done = {run: finished_shards(store, run.stem) for run in runs}
    missing = sum(run.size - finished.units for run, finished in done.items())
    if missing:
        return SyntheticResult(None, made, missing)
    indices = [index_name(run.stem, number) for run, finished in done.items() for number in range(finished.shards)]
    return SyntheticResult(write_manifest(store, indices, KIND, _identity(options)["options"]), made, 0)


def _runs(options: SyntheticOptions) -> list[SyntheticRange]:
    starts = range(0, options.number, options.samples_per_shard)
    stops = (min(start + options.samples_per_shard, options.number) for start in starts)
    return [
        SyntheticRange(f"shapes-{number:06d}", start, stop)
        for number, (start, stop) in enumerate(zip(starts, stops, strict=True))
    ]


def _identity(options: SyntheticOptions) -> dict[str, Any]:
    drawing = {"drawing_version": DRAWING_VERSION, "codec": "libx264", "preset": PRESET, "x264_params": X264_PARAMS}
    asked = asdict(options) | {"backgrounds": list(options.backgrounds)}  # as JSON has them
    return {"kind": KIND, "schema_version": SCHEMA_VERSION, "options": asked | drawing}


def _make_missing(
    store: Store, runs: Sequence[SyntheticRange], options: SyntheticOptions, pool: Pool, progress: Progress
) -> int:
    finished = {run: finished_shards(store, run.stem) for run in runs}
    total, done, made = sum(run.size for run in runs), sum(there.units for there in finished.values()), 0
    progress("draw", done, total)
    limits = ShardLimits(options.shard_mb << 20, options.samples_per_shard)
    results = pool.run(_make, _calls(finished, options))
    for run, batches in groupby(results, key=itemgetter(0)):
        with ShardWriter(store, run.stem, limits, finished[run]) as writer:
            for _, samples in batches:
                for sample in samples:
                    writer.add(sample)
                done += len(samples)
                progress("draw", done, total)
        made += writer.made
    return made


def _calls(
    finished: dict[SyntheticRange, Finished], options: SyntheticOptions
) -> Iterator[tuple[SyntheticRange, tuple[range, SyntheticOptions]]]:
    for run, there in finished.items():
        for start in range(run.start + there.units, run.stop, _CLIPS_PER_CALL):
            yield run, (range(start, min(start + _CLIPS_PER_CALL, run.stop)), options)


def _make(numbers: range, options: SyntheticOptions) -> list[NewSample]:
    """Make clips as samples, in a worker."""
    return [_sample(make_clip(number, options), options) for number in numbers]


def _sample(clip: SyntheticClip, options: SyntheticOptions) -> NewSample:
    info, scene = clip.info, clip.scene
    source = f"synthetic {options.split}, seed {options.seed}"
    described = SampleFacts(info.frames, info.height, info.width, info.fps, source, clip.caption)
    facts = asdict(scene.attributes) | {"number": clip.number, "radius": scene.radius}
    facts |= {"start_xy": scene.start, "end_xy": scene.end}
    return NewSample(f"{options.split}-{options.content}-{clip.number:09d}", clip.data, described, facts=facts)
