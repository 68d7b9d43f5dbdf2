"""Building and checking a dataset. A build is resumable: shards that are finished stay, the rest is made, the
manifest is last."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from regen_dist.data.index import (
    MANIFEST,
    SCHEMA_VERSION,
    VIDEO_EXTENSION,
    Dataset,
    Manifest,
    Sample,
    ShardEntry,
    Skip,
    Totals,
    dataset_fingerprint,
    open_dataset,
    read_index,
    scan_shard,
    write_index,
)
from regen_dist.data.plan import BuildOptions, BuildPlan, ShardPlan, Task, find_sources, make_plan, read_captions
from regen_dist.data.pool import Pool, worker_pool
from regen_dist.data.store import Store, remove_leftovers
from regen_dist.data.transcode import Encoded, Probed, encode_segments, probe
from regen_dist.errors import DataError

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
        made = _make_missing(store, plan, pool, progress)
    return Built(_write_manifest(store, plan), made)


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
    for row in pc.indices_nonzero(pc.equal(dataset.table["shard"], shard)).to_pylist():
        try:
            dataset.read(dataset.sample(row))
        except DataError as error:
            yield str(error).split(";")[0]


def _plan(
    sources: Sequence[Path], options: BuildOptions, captions: dict[str, str], pool: Pool, progress: Progress
) -> BuildPlan:
    files = find_sources(sources)
    probed: list[Probed] = []
    for _, result in pool.run(probe, ((file, (file.path,)) for file in files)):
        probed.append(result)
        progress("probe", len(probed), len(files))
    plan = make_plan(files, probed, options, captions)
    if not plan.shards:
        raise DataError(f"no sample is left of {len(files)} files:\n{_listed(plan.skipped)}")
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
        store.put(PLAN, _json(plan.identity))


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


def _make_missing(store: Store, plan: BuildPlan, pool: Pool, progress: Progress) -> int:
    finished = _finished(store, plan)
    todo = [shard for shard in plan.shards if shard.stem not in finished]
    total = sum(len(task.segments) for shard in plan.shards for task in shard.tasks)
    done = total - sum(len(task.segments) for shard in todo for task in shard.tasks)
    progress("build", done, total)
    calls = (((shard, task), (task.source.path, task.segments, plan.encode)) for shard in todo for task in shard.tasks)
    pending: list[tuple[Task, Encoded]] = []
    for (shard, task), results in pool.run(encode_segments, calls):
        pending += [(task, result) for result in results]
        done += len(results)
        if task is shard.tasks[-1]:
            _write_shard(store, shard, pending)
            pending = []
        progress("build", done, total)
    return len(todo)


def _finished(store: Store, plan: BuildPlan) -> set[str]:
    """Shards whose index is there (it is written after the tar) and whose tar has the size that the index tells."""
    found = store.list()
    finished = set()
    for shard in plan.shards:
        if shard.index in found:
            facts = read_index(store.get(shard.index))[1]
            if found.get(shard.tar, 0) == facts["size"]:
                finished.add(shard.stem)
    return finished


def _write_shard(store: Store, shard: ShardPlan, results: Sequence[tuple[Task, Encoded]]) -> None:
    """Tar first, index second, each whole or not at all. A shard of which nothing is left has an index only."""
    good = [(task, result) for task, result in results if not result.problem]
    skipped = [
        Skip(source=task.source.name, segment=result.segment.number, reason=result.problem)
        for task, result in results
        if result.problem
    ]
    samples: list[Sample] = []
    facts: dict[str, Any] = {"size": 0, "sha256": "", "skipped": [skip.model_dump() for skip in skipped]}
    if good:
        with store.staging(shard.tar) as temporary:
            _write_tar(temporary, good)
            samples = scan_shard(temporary, shard.tar)
            with temporary.open("rb") as file:
                facts |= {"size": temporary.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
            store.put_file(shard.tar, temporary)
    store.put(shard.index, write_index(samples, facts))


def _write_tar(path: Path, results: Sequence[tuple[Task, Encoded]]) -> None:
    from webdataset.writer import TarWriter

    with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
        for task, result in results:
            assert result.info is not None, "a result without a problem has been probed"
            segment = result.segment
            facts = {
                "source": task.source.name,
                "first_frame": segment.start,
                "frames": result.info.frames,
                "height": result.info.height,
                "width": result.info.width,
                "fps": result.info.fps,
                "caption": task.caption,
            }
            sample = {"__key__": segment.key, VIDEO_EXTENSION: result.data, "json": json.dumps(facts).encode()}
            tar.write(sample | ({"txt": task.caption.encode()} if task.caption else {}))


def _write_manifest(store: Store, plan: BuildPlan) -> Manifest:
    """Gather what the indices say. Written last: its presence means that all the rest is there."""
    entries, tables, skipped = [], [], list(plan.skipped)
    for shard in plan.shards:
        data = store.get(shard.index)
        table, facts = read_index(data)
        skipped += [Skip(**skip) for skip in facts["skipped"]]
        if table.num_rows:
            tables.append(table)
            entries.append(_entry(shard, data, facts, table.num_rows))
    if not tables:
        raise DataError(f"{store.url}: no sample is left:\n{_listed(skipped)}")
    table = pa.concat_tables(tables)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        fingerprint=dataset_fingerprint(table),
        totals=_totals(table, entries),
        shards=tuple(entries),
        options=plan.identity["options"],
        skipped=tuple(skipped),
    )
    data = _json(manifest.model_dump(mode="json"))
    if MANIFEST not in store.list(MANIFEST) or store.get(MANIFEST) != data:
        store.put(MANIFEST, data)
    return manifest


def _entry(shard: ShardPlan, index: bytes, facts: dict[str, Any], samples: int) -> ShardEntry:
    return ShardEntry(
        name=shard.tar,
        size=facts["size"],
        sha256=facts["sha256"],
        index=shard.index,
        index_sha256=hashlib.sha256(index).hexdigest(),
        samples=samples,
    )


def _totals(table: pa.Table, entries: Sequence[ShardEntry]) -> Totals:
    frames, fps = table["frames"].to_numpy(), table["fps"].to_numpy()
    return Totals(
        shards=len(entries),
        samples=table.num_rows,
        frames=int(frames.sum()),
        seconds=round(float((frames / fps).sum()), 3),
        bytes=sum(entry.size for entry in entries),
    )


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode()


def _listed(skipped: Sequence[Skip]) -> str:
    lines = [
        f"  {skip.source}{'' if skip.segment is None else f' segment {skip.segment}'}: {skip.reason}"
        for skip in skipped
    ]
    return "\n".join(lines[:10] + ([f"  and {len(lines) - 10} more"] if len(lines) > 10 else []))
