"""Building and checking a dataset. A build is resumable: shards that are finished stay, the rest is made, the
manifest is last."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from regen_dist.data.catalogue import Dataset, open_dataset
from regen_dist.data.index import Described, samples_of
from regen_dist.data.manifest import Manifest, Skip, listed, to_json, write_manifest
from regen_dist.data.plan import BuildOptions, BuildPlan, Task, find_sources, make_plan, read_captions
from regen_dist.data.pool import Pool, worker_pool
from regen_dist.data.store import Store, remove_leftovers
from regen_dist.data.transcode import Encoded, Probed, encode_segments, probe
from regen_dist.data.writing import Limits, NewSample, ShardWriter, finished_shards, index_name
from regen_dist.errors import DataError

STEM = "shard"
PLAN = "plan.json"  # written first: it marks a folder as ours, and holds what the build was asked for
Progress = Callable[[str, int, int], None]  # (stage, done, total)


class Built(NamedTuple):
    """A finished build: its manifest, and how many of its shards this call made."""

    manifest: Manifest
    shards_made: int


def build_shards(
    sources: Sequence[Path],
    out: str | Path,
    options: BuildOptions | None = None,
    *,
    captions: Path | None = None,
    workers: int | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Built:
    """Make (or finish) the dataset of `sources` at `out`.

    Args:
        sources: video files, and folders that are searched for them.
        out: folder or URL of the dataset: empty, or begun by the same sources and options.
        captions: CSV or JSONL with the columns `video` and `caption`.
        workers: processes; all cores by default, 0 works in this process.
        progress: called with ("probe" or "build", done, total).

    Raises:
        DataError: a source is missing, `out` holds something else, or no sample is left.
    """
    options, store = options or BuildOptions(), Store(out)
    with worker_pool(workers) as pool:
        plan = _plan(sources, options, read_captions(captions) if captions else {}, pool, progress)
        _claim(store, plan)
        writer = _make_missing(store, plan, pool, options, progress)
    indices = [index_name(STEM, number) for number in range(writer.shards)]
    return Built(write_manifest(store, indices, "build", plan.identity["options"], plan.skipped), writer.made)


def verify_dataset(url: str | Path, progress: Progress = lambda stage, done, total: None) -> list[str]:
    """Check every shard's size and SHA-256. Returns a line for each bad shard, and for each bad sample in it."""
    dataset = open_dataset(url)
    sizes = dataset.store.list()
    bad = []
    for number, entry in enumerate(dataset.manifest.shards):
        progress("verify", number, len(dataset.manifest.shards))
        if sizes.get(entry.name) != entry.size:
            found = f"{sizes[entry.name]} bytes" if entry.name in sizes else "missing"
            bad.append(f"{entry.name}: {found}, the manifest says {entry.size} bytes")
        elif dataset.store.sha256(entry.name) != entry.sha256:
            bad.append(f"{entry.name}: the bytes differ from those that were written")
        else:
            continue
        if entry.name in sizes:
            bad += _verify_samples(dataset, entry.name)
    progress("verify", len(dataset.manifest.shards), len(dataset.manifest.shards))
    return bad


def _verify_samples(dataset: Dataset, shard: str) -> Iterator[str]:
    for sample in samples_of(dataset.table()):
        try:
            if sample.shard == shard:
                dataset.read(sample)
        except DataError as error:
            yield f"{sample.name}: {str(error).split(';')[0]}"


def _plan(
    sources: Sequence[Path], options: BuildOptions, captions: dict[str, str], pool: Pool, progress: Progress
) -> BuildPlan:
    files = find_sources(sources)
    probed: list[Probed] = []
    for _, result in pool.run(probe, ((file, (file.path,)) for file in files)):
        probed.append(result)
        progress("probe", len(probed), len(files))
    plan = make_plan(files, probed, options, captions)
    if not plan.tasks:
        raise DataError(f"no sample is left of {len(files)} files:\n{listed(plan.skipped)}")
    return plan


def _claim(store: Store, plan: BuildPlan) -> None:
    """Make sure that the folder is ours: empty, or begun by this same plan."""
    found = store.list()
    if PLAN in found:
        theirs = json.loads(store.get(PLAN))
        changes = _changes(theirs, plan.identity)
        if changes:
            raise DataError(
                f"{store.url}: holds a dataset built from something else ({'; '.join(changes)}). "
                "Give the same options to finish it, or another --out; nothing was changed"
            )
        if store.folder is not None:
            remove_leftovers(store.folder)
    elif found:
        some = ", ".join(list(found)[:3])
        raise DataError(
            f"{store.url}: holds files that no build made ({some}); choose an empty --out. Nothing was changed"
        )
    else:
        store.put(PLAN, to_json(plan.identity))


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    changes = []
    for part in sorted(old.keys() | new.keys()):
        before, after = old.get(part), new.get(part)
        if isinstance(before, dict) and isinstance(after, dict):
            names = [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]
            changes += [
                f"{part}.{name}: {before.get(name, 'absent')} there, {after.get(name, 'absent')} now"
                for name in names[:4]
            ]
        elif before != after:
            changes.append(f"{part}: {before} there, {after} now")
    return changes


def _make_missing(store: Store, plan: BuildPlan, pool: Pool, options: BuildOptions, progress: Progress) -> ShardWriter:
    after = finished_shards(store, STEM)
    total, todo = sum(len(task.segments) for task in plan.tasks), _after(plan.tasks, after.units)
    progress("build", after.units, total)
    calls = ((task, (task.source.path, task.segments, plan.encode)) for task in todo)
    with ShardWriter(store, STEM, Limits(samples=options.samples_per_shard), after) as writer:
        for task, results in pool.run(encode_segments, calls):
            for result in results:
                _write(writer, task, result)
            progress("build", writer.units, total)
    return writer


def _after(tasks: Sequence[Task], units: int) -> Iterator[Task]:
    """The tasks without their first segments."""
    for task in tasks:
        left = task.segments[units:]
        units = max(0, units - len(task.segments))
        if left:
            yield Task(task.source, task.caption, left)


def _write(writer: ShardWriter, task: Task, result: Encoded) -> None:
    if result.info is None:
        writer.skip(Skip(source=task.source.name, segment=result.segment.number, reason=result.problem))
        return
    info = result.info
    described = Described(info.frames, info.height, info.width, info.fps, task.source.name, task.caption)
    facts = {"first_frame": result.segment.start}
    writer.add(NewSample(result.segment.key, result.data, described, facts=facts))
