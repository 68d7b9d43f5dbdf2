"""Dataset verification: sizes and checksums, and optionally every frame of every video, or every tensor of a latent
cache."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from regen_dist.data.build.foreign import index_name
from regen_dist.data.build.tarscan import Pieces, printable
from regen_dist.data.format.index import Sample, checksum, read_index, samples_of
from regen_dist.data.format.manifest import MANIFEST, PLAN, DatasetManifest, ShardEntry, read_manifest
from regen_dist.data.pool import worker_pool
from regen_dist.data.storage.store import Store
from regen_dist.data.video.reader import VideoReader
from regen_dist.errors import DataError

if TYPE_CHECKING:
    from regen_dist.data.format.latents import CacheFacts
    from regen_dist.data.pool import Progress

Depth = Literal["quick", "bytes", "deep"]
SampleCheck = Callable[[Sample, bytes], str]  # finds the problem of a sample with correct bytes; empty if none
_OURS = (PLAN, MANIFEST)
_SAMPLES_NAMED = 20  # of one shard
_RECORDS = re.compile(r"part-\d{5,}(\.plan)?\.json|(latents-\d{6}\.)?statistics\.json")  # of a build, of a cache
_INDEX = re.compile(r"(part-\d{5,}|latents-\d{6})-\d{6}\.parquet")


@dataclass(frozen=True)
class CheckResult:
    """Result of a verification: a line for each problem (a shard first, then its samples), and notes."""

    manifest: DatasetManifest
    bad: tuple[str, ...]
    notes: tuple[str, ...]


def verify_dataset(
    url: str | Path,
    depth: Depth = "bytes",
    *,
    workers: int | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> CheckResult:
    """Check a dataset against its manifest.

    Args:
        url: folder or URL of the dataset.
        depth: "quick" lists the objects and compares sizes; "bytes" reads everything once and compares checksums;
            "deep" also decodes every frame, or unpacks all latents, and compares number and sides with the index.
        workers: processes; all cores by default, 0 works in this process.
        progress: called with ("verify", done, total) in shards.

    Raises:
        DataError: there is no manifest, it is damaged, or the store cannot be read.
    """
    store = Store(url)
    manifest = read_manifest(store)
    facts = None
    if manifest.kind == "latents":
        from regen_dist.data.format import latents  # torch, which videos do not need

        facts = latents.CacheFacts.of(manifest, store.url)
    shards = Store(manifest.shards_url) if manifest.shards_url else store
    found = store.list()
    tars = shards.list() if manifest.shards_url else found
    bad = (
        _against_totals(manifest)
        + _against_source(manifest)
        + ([] if facts is None else _check_null_text(store, facts, found, depth))
    )
    calls = (
        (entry, (store, shards, entry, entry.index in found, tars.get(entry.name), depth, facts))
        for entry in manifest.shards
    )
    progress("verify", 0, len(manifest.shards))
    with worker_pool(0 if depth == "quick" else workers) as pool:
        for done, (_, problems) in enumerate(pool.run(check_shard, calls), 1):
            bad += problems
            progress("verify", done, len(manifest.shards))
    return CheckResult(manifest, tuple(bad), tuple(_unknown(store, manifest, found)))


def check_shard(
    store: Store,
    shards: Store,
    entry: ShardEntry,
    has_index: bool,
    size: int | None,
    depth: Depth,
    facts: CacheFacts | None = None,
) -> list[str]:
    """List the problems of one shard.

    Args:
        store: store of its index.
        shards: store of its tar.
        entry: its entry in the manifest.
        has_index: true if the index exists.
        size: size of the tar in bytes; None if it does not exist.
        depth: depth of the check (see `verify_dataset`).
        facts: description of the latents; None if the samples are videos.
    """
    bad = [] if has_index else [f"{entry.index}: missing"]
    if size != entry.size:
        bad.append(
            f"{entry.name}: {'missing' if size is None else f'{size} bytes'}, the manifest says {entry.size} bytes"
        )
    if depth == "quick":
        return bad
    samples: list[Sample] = []
    if has_index:
        samples, problem = _read_samples(store, entry)
        bad += problem
    deep_check = None if depth != "deep" else _decode if facts is None else partial(_unpack, facts)
    return bad if size is None else bad + _check_tar(shards, entry, size, samples, deep_check)


def _read_samples(store: Store, entry: ShardEntry) -> tuple[list[Sample], list[str]]:
    """Read the samples of an index, in order of their offsets; or the problems of the index."""
    data = store.get(entry.index)
    if hashlib.sha256(data).hexdigest() != entry.index_sha256:
        return [], [f"{entry.index}: the bytes differ from those that were written"]
    try:
        samples = samples_of(read_index(data)[0])
    except DataError as error:
        return [], [f"{entry.index}: {error}"]
    if len(samples) != entry.samples:
        return [], [f"{entry.index}: holds {len(samples)} samples, the manifest says {entry.samples}"]
    return sorted(samples, key=lambda sample: sample.offset), []


def _check_tar(
    shards: Store, entry: ShardEntry, size: int, samples: Sequence[Sample], deep_check: SampleCheck | None
) -> list[str]:
    """Verify in one pass the checksums of a tar and of each sample, and apply `deep_check` to each sample."""
    bad = []
    with Pieces(shards, entry.name) as pieces:
        for sample in samples:
            pieces.skip(max(0, sample.offset - pieces.position))
            problem = _check_sample(sample, pieces.take(sample.size), deep_check)
            bad += [f"{sample.name}: {problem}"] if problem else []
        same = pieces.sha256() == entry.sha256
    more = [f"{entry.name}: and {len(bad) - _SAMPLES_NAMED} samples more"] if len(bad) > _SAMPLES_NAMED else []
    bad = bad[:_SAMPLES_NAMED] + more
    if not same and size == entry.size:
        where = "" if bad or not samples else ", in no sample: in the tar's own headers or in another member"
        bad.insert(0, f"{entry.name}: the bytes differ from those that were written{where}")
    return bad


def _check_sample(sample: Sample, data: bytes, deep_check: SampleCheck | None) -> str:
    if len(data) < sample.size:
        return f"{len(data)} of its {sample.size} bytes are there"
    if checksum(data) != sample.checksum:
        return f"the bytes differ from those that were written (checksum {checksum(data)}, not {sample.checksum})"
    return deep_check(sample, data) if deep_check else ""


def _decode(sample: Sample, data: bytes) -> str:
    """Decode every frame, and compare their number and sides with the index."""
    try:
        with VideoReader(data) as reader:
            info = reader.info()
            sides = Counter((frame.height, frame.width) for _, frame in reader.frames(range(info.frames)))
    except DataError as error:
        return str(error)
    if (info.frames, info.height, info.width) != (sample.frames, sample.height, sample.width):
        return (
            f"{info.frames} frames of {info.height}x{info.width} come out, the index says {sample.frames} of "
            f"{sample.height}x{sample.width}"
        )
    return f"the sides change within it: {', '.join(f'{h}x{w}' for h, w in sides)}" if len(sides) > 1 else ""


def _unpack(facts: CacheFacts, sample: Sample, data: bytes) -> str:
    """Compare the tensors with the index and the manifest, and search for non-finite values."""
    from regen_dist.data.format.latents import unpack_latents

    try:
        entry = unpack_latents(data)
        facts.check(entry, sample.frames, sample.height, sample.width)
    except DataError as error:
        return str(error)
    tensors = {"content": entry.content, "motion": entry.motion, "text": entry.text}
    broken = [name for name, tensor in tensors.items() if tensor is not None and not bool(tensor.isfinite().all())]
    return f"{', '.join(broken)}: not all values are finite" if broken else ""


def _check_null_text(store: Store, facts: CacheFacts, found: dict[str, int], depth: Depth) -> list[str]:
    from regen_dist.data.format.latents import read_null_text

    if facts.null_text is not None and facts.null_text not in found:
        return [f"{facts.null_text}: missing"]
    try:
        if depth != "quick":
            read_null_text(store, facts)
    except DataError as error:
        return [str(error)]
    return []


def _against_totals(manifest: DatasetManifest) -> list[str]:
    sums = len(manifest.shards), sum(s.samples for s in manifest.shards), sum(s.size for s in manifest.shards)
    totals = manifest.totals.shards, manifest.totals.samples, manifest.totals.bytes
    if sums == totals:
        return []
    return [f"{MANIFEST}: its totals (shards, samples, bytes) are {totals}, those of its shards {sums}"]


def _against_source(manifest: DatasetManifest) -> list[str]:
    """Check that a cache accounts for all of its source videos; older caches do not record their number."""
    if manifest.kind != "latents" or "samples" not in (source := manifest.options.get("source") or {}):
        return []
    accounted = manifest.totals.samples + manifest.num_skipped
    if accounted == source["samples"]:
        return []
    return [f"{MANIFEST}: entries and what was left out are {accounted}, the videos were {source['samples']}"]


def _unknown(store: Store, manifest: DatasetManifest, found: dict[str, int]) -> Iterator[str]:
    known = {*_OURS, *(entry.name for entry in manifest.shards), *(entry.index for entry in manifest.shards)}
    known |= {str(manifest.options["null_text"])} if manifest.kind == "latents" else set()
    tars = {skip.source.partition(": ")[0] for skip in manifest.skipped} if manifest.kind == "index" else set()
    known |= tars | {index_name(tar) for tar in tars}  # tars that are broken, or hold nothing that can be used
    if manifest.kind in ("build", "latents"):
        known |= {name for name in found if _RECORDS.fullmatch(name) or _is_index_alone(name, found)}
    left = [path.name for path in sorted(store.folder.glob(".*.tmp"))] if store.folder is not None else []
    all_known = manifest.kind != "index" or manifest.skipped_counts is None  # a cut list does not name every tar
    unknown = [name for name in map(printable, found) if name not in known] if all_known else []
    for what, names in (
        ("not named by the manifest", unknown),
        ("left by a killed command (the same command again removes them)", left),
    ):
        if names:
            yield f"{len(names)} objects {what}: {', '.join(names[:5])}{', …' if len(names) > 5 else ''}"


def _is_index_alone(name: str, found: dict[str, int]) -> bool:
    """Return true for the index of a shard in which everything was left out: it has no tar."""
    return _INDEX.fullmatch(name) is not None and f"{name.removesuffix('.parquet')}.tar" not in found
