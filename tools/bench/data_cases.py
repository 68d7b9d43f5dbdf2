"""Cases of `regen bench data`: loader against decoding alone, fetcher against obstore and WebDataset, planning,
wait."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from datetime import timedelta
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from regen_dist.config.datasets import DataConfig, ReadConfig
from regen_dist.config.urls import parse_url
from regen_dist.data.format.catalogue import Dataset, SampleRow, open_dataset
from regen_dist.data.format.index import SCHEMA_VERSION, VIDEO_EXTENSIONS, SampleFacts
from regen_dist.data.format.manifest import MANIFEST, claim, write_manifest
from regen_dist.data.format.writing import NewSample, ShardLimits, ShardWriter, index_name
from regen_dist.data.loading.clip_loader import clip_batches, clip_geometry
from regen_dist.data.loading.datasets import TrainingSet
from regen_dist.data.loading.fetch import Fetcher, FetchResult, SampleLocation
from regen_dist.data.loading.plan import BatchPlan
from regen_dist.data.order.order import Bucket, BucketStream, ClipDraw, DataOrder, draw_clip
from regen_dist.data.storage.connection import StoreLimits, open_backend
from regen_dist.data.storage.store import Store
from regen_dist.data.video.conversion import Geometry, UInt8s
from regen_dist.data.video.reader import VideoReader, read_clip
from regen_dist.data.video.timing import clip_frames
from regen_dist.errors import DataError
from regen_dist.jsontext import json_text
from regen_dist.observe.hardware import process_memory_bytes
from regen_dist.programs import python, start_safely
from tools import stages
from tools.bench.common import Turn, measured, require_success, turn_of

if TYPE_CHECKING:
    from threading import Barrier


WARM_BATCHES = 4  # of each worker, before the clock starts
_READY_S = 120.0  # to read every clip's bytes


class Workload(NamedTuple):
    """Workload: `batches` micro-batches of `batch` clips by each of `workers` processes."""

    config: DataConfig
    num_frames: int
    batch: int
    batches: int
    workers: int
    seed: int = 0

    @property
    def first(self) -> int:
        """First measured step; earlier ones warm the loader up."""
        return WARM_BATCHES * self.workers

    def open(self) -> TrainingSet:
        """Open the samples and their order."""
        config = self.config.model_copy(update={"workers": self.workers})
        return TrainingSet(config, num_frames=self.num_frames, batch_global=self.batch, seed=self.seed)


def through_loader(stretch: Workload, store: int | None = None) -> Turn:
    """Measure clips per second of a warm `clip_batches`, consumed at full speed. `store` is the store's process."""
    batches = clip_batches(stretch.open(), accumulation=1, rank=0, world_size=1, cursor=0)
    try:
        for _ in islice(batches, stretch.first):
            pass
        with measured(store) as costs:
            clips = sum(len(batch.sample_ids) for batch in islice(batches, stretch.batches * stretch.workers))
    finally:
        batches.close()
    return turn_of(clips, costs)


def from_memory(stretch: Workload) -> Turn:
    """Measure clips per second of the same number of processes, each decoding the clips of its counterpart in the
    loader from memory and discarding the pixels."""
    start_safely()
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    barrier = context.Barrier(stretch.workers)
    with ProcessPoolExecutor(stretch.workers, context, _keep, (barrier,)) as pool:
        parts = list(pool.map(_decode_part, [stretch] * stretch.workers, range(stretch.workers)))
    seconds = max(part.seconds for part in parts)  # the loader too is as fast as the slowest: its batches have an order
    return Turn(sum(part.clips for part in parts), seconds, {"own_cpu_s": sum(part.cpu_s for part in parts)})


class ClipToDecode(NamedTuple):
    """Inputs of one decoding."""

    data: bytes
    frames: int
    draw: ClipDraw
    geometry: Geometry
    flip: bool

    def decode(self) -> UInt8s:
        """Decode the clip, uint8 [3, T, H, W]."""
        with VideoReader(self.data) as reader:
            numbers = clip_frames(reader.table, self.draw.start, self.draw.stride, self.frames)
            return read_clip(reader, numbers, self.geometry, flip=self.flip)


def clips_of(stretch: Workload, worker: int) -> Iterator[ClipToDecode]:
    """Yield the clips of a loader worker's batches in order, with their bytes."""
    data = stretch.open()
    config, stop = data.config, stretch.first + stretch.batches * stretch.workers
    for batch in islice(BatchPlan(data, 0, 1, 0, 1), stretch.first + worker, stop, stretch.workers):
        for (dataset, row), epoch in zip(data.places(batch), batch.epochs.tolist(), strict=True):
            draw = draw_clip(stretch.seed, epoch, row.id, row.frames, batch.bucket.frames, config.stride)
            place = clip_geometry(row.height, row.width, batch.bucket, config.short_side, (draw.crop_y, draw.crop_x))
            data_of_it = data.datasets[dataset].read(row)
            yield ClipToDecode(data_of_it, batch.bucket.frames, draw, place, draw.flip and config.flip)


class _ClipCount(NamedTuple):
    clips: int
    seconds: float
    cpu_s: float


_barrier: Barrier | None = None


def _keep(barrier: Barrier) -> None:
    global _barrier
    _barrier = barrier


def _decode_part(stretch: Workload, worker: int) -> _ClipCount:
    """Decode one process's share; all start together once all bytes are in memory."""
    clips = list(clips_of(stretch, worker))
    assert _barrier is not None, "set as the process starts"
    _barrier.wait(_READY_S)
    begun, cpu = time.perf_counter(), time.process_time()
    for clip in clips:
        clip.decode()
    return _ClipCount(len(clips), time.perf_counter() - begun, time.process_time() - cpu)


# Bytes of samples per second: by our `Fetcher`, in any order, checked; and by obstore alone, which fetches the same
# ranges and does nothing else.

_BATCH = 16  # samples that are asked for together


def shuffled_rows(dataset: Dataset, seed: int = 0) -> list[int]:
    """Return every row once, in shuffled order as in training."""
    return [int(row) for row in np.random.default_rng(seed).permutation(len(dataset))]


def by_fetcher(url: str, config: ReadConfig, rows: Sequence[int], store: int | None = None) -> Turn:
    """Measure bytes per second of one `Fetcher`. `store` is the store's process.

    Raises:
        DataError: the bytes of a sample were wrong.
    """
    dataset = open_dataset(url, config.cache)
    with Fetcher([dataset], config) as fetcher, measured(store) as costs:
        found = [each for _, batch in fetcher.ahead(_batches(dataset, rows)) for each in map(_size, batch)]
    return turn_of(sum(found), costs, samples=len(found))


def by_obstore(url: str, config: ReadConfig, rows: Sequence[int], store: int | None = None) -> Turn:
    """Measure bytes per second of plain obstore: one request per sample, `config.requests` concurrently."""
    import obstore

    dataset = open_dataset(url, config.cache)
    backend = open_backend(parse_url(url), StoreLimits(config.stall_s, config.deadline_s))
    ranges = list(map(dataset.row, rows))

    def fetch(row: SampleRow) -> int:
        return len(obstore.get_range(backend, row.shard, start=row.offset, length=row.size))

    with ThreadPoolExecutor(config.requests) as threads, measured(store) as costs:
        found = list(threads.map(fetch, ranges))
    return turn_of(sum(found), costs, samples=len(found))


def by_obstore_many(url: str, config: ReadConfig, rows: Sequence[int], store: int | None = None) -> Turn:
    """Measure as `by_obstore`, with all ranges of a shard in one obstore call, which parallelises them itself."""
    import obstore

    dataset = open_dataset(url, config.cache)
    backend = open_backend(parse_url(url), StoreLimits(config.stall_s, config.deadline_s))
    shards: dict[str, list[tuple[int, int]]] = {}
    for row in map(dataset.row, rows):
        shards.setdefault(row.shard, []).append((row.offset, row.size))

    def fetch(name: str) -> list[int]:
        starts, lengths = zip(*shards[name], strict=True)
        found = obstore.get_ranges(backend, name, starts=starts, lengths=lengths, coalesce=0)
        return [len(each) for each in found]

    with ThreadPoolExecutor(config.requests) as threads, measured(store) as costs:
        found = [size for sizes in threads.map(fetch, shards) for size in sizes]
    return turn_of(sum(found), costs, samples=len(found))


def _batches(dataset: Dataset, rows: Sequence[int]) -> Iterator[tuple[int, list[SampleLocation]]]:
    for start in range(0, len(rows), _BATCH):
        yield start, [SampleLocation(0, dataset.row(row)) for row in rows[start : start + _BATCH]]


def _size(found: FetchResult) -> int:
    if found.problem is not None:
        raise DataError(f"a benchmark needs a whole dataset: {found.problem}")
    return len(found.data)


# The same samples through plain `webdataset.WebDataset`, which reads whole tars sequentially.

_VALID_S = 3600


def presigned(url: str) -> list[str]:
    """An HTTP address for each shard of a dataset in a bucket, which needs no keys for an hour. WebDataset opens it by
    curl."""
    import obstore

    names = [entry.name for entry in open_dataset(url).manifest.shards]
    signed = obstore.sign(open_backend(parse_url(url), StoreLimits()), "GET", names, timedelta(seconds=_VALID_S))  # type: ignore[call-overload]
    return list(signed)


def piped(url: str) -> list[str] | None:
    """Return the command by which WebDataset pipes each shard: `aws s3 cp`. None without `aws`."""
    program = shutil.which("aws", path=str(Path(sys.executable).parent)) or shutil.which("aws")
    if program is None:
        return None
    command = f"pipe:{shlex.quote(program)} s3 cp --quiet"
    return [f"{command} {shlex.quote(f'{url}/{entry.name}')} -" for entry in open_dataset(url).manifest.shards]


def by_webdataset(addresses: Sequence[str], store: int | None = None) -> Turn:
    """Measure video bytes per second through `WebDataset` over these addresses."""
    import webdataset

    with measured(store) as costs:
        dataset: Iterable[dict[str, object]] = webdataset.WebDataset(list(addresses), shardshuffle=False)
        found = [_video_bytes(sample) for sample in dataset]
    return turn_of(sum(found), costs, samples=len(found))


def _video_bytes(sample: dict[str, object]) -> int:
    return sum(len(part) for name, part in sample.items() if name in VIDEO_EXTENSIONS and isinstance(part, bytes))


# Time and memory of planning, and seconds from nothing to the first batch: each in a process of its own, because the
# peak memory of a process never falls, and importing the library is a part of a start.

BATCH = 8192
_WEIGHTS = (1.0, 2.0, 3.0)
_BUCKETS = 6


def plan(samples: int, *, mixed: bool) -> dict[str, float]:
    """Plan one epoch of `samples` samples in global batches of 8192: one bucket, or six buckets of three datasets.

    Returns:
        `seconds` to the last batch; `peak_mb`, the process's peak memory; `before_mb`, its memory before planning.
    """
    return _in_a_process("plan", samples=samples, mixed=mixed)


def first_batch(url: str, cache: Path, *, crop: int, num_frames: int, batch: int) -> dict[str, float]:
    """Start a program that opens the dataset and takes one batch from two workers.

    Args:
        url: dataset.
        cache: folder of the catalogue; where it holds the dataset's, that is used.
        crop: height and width of a clip in pixels.
        num_frames: frames of a clip.
        batch: clips of the batch.

    Returns:
        seconds: `import_s` (Python, the library and torch), `open_s` (the dataset), `batch_s` (workers, bytes,
        decoding) and `seconds`, the whole program.
    """
    begun = time.perf_counter()
    options = {"url": url, "crop": crop, "num_frames": num_frames, "batch": batch, "begun": begun}
    found = _in_a_process("start", os.environ | {"REGEN_CACHE": str(cache)}, **options)
    return {"seconds": time.perf_counter() - begun, **found}


def _in_a_process(what: str, environment: Mapping[str, str] | None = None, **options: Any) -> dict[str, float]:
    """Return the result of one of `_MEASURED` from `python -m` of this module."""
    done = stages.run_program(python("-m", __name__, what, json_text(options)), environment=environment)
    require_success(done.returncode, f"measuring {what}", done.stderr)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def make_order(samples: int, *, mixed: bool) -> DataOrder:
    """Return the order to be planned."""
    if not mixed:
        return DataOrder.single(samples, BATCH, seed=0)
    each = samples // (_BUCKETS * len(_WEIGHTS))
    buckets = [Bucket(64, 64 + 16 * number, 17) for number in range(_BUCKETS)]
    return DataOrder([BucketStream(bucket, (each,) * len(_WEIGHTS)) for bucket in buckets], BATCH, 0, _WEIGHTS)


def _plan(samples: int, mixed: bool) -> dict[str, float]:
    # Not by `getrusage`, which has the parent's peak where that is larger.
    before, begun = process_memory_bytes("VmHWM"), time.perf_counter()
    order = make_order(samples, mixed=mixed)
    for step in range(-(-samples // BATCH)):
        order.global_batch(step)
    seconds = time.perf_counter() - begun
    return {"seconds": seconds, "peak_mb": process_memory_bytes("VmHWM") / 1e6, "before_mb": before / 1e6}


def _start(url: str, crop: int, num_frames: int, batch: int, begun: float) -> dict[str, float]:
    imported = time.perf_counter()  # the same clock in every process
    config = DataConfig(url=url, size=(crop, crop), short_side="fit", workers=2)
    data = TrainingSet(config, num_frames=num_frames, batch_global=batch, seed=0)
    opened = time.perf_counter()
    batches = clip_batches(data, accumulation=1, rank=0, world_size=1, cursor=0)
    next(batches)
    there = time.perf_counter()
    batches.close()
    return {"import_s": imported - begun, "open_s": opened - imported, "batch_s": there - opened}


_MEASURED: dict[str, Callable[..., dict[str, float]]] = {"plan": _plan, "start": _start}


# A dataset of small samples whose bytes are drawn, for what reads bytes and decodes nothing.

_DESCRIBED = SampleFacts(frames=17, height=64, width=64, fps=24.0, source="drawn bytes, not a video")


def make_small_samples(
    url: str, number: int, *, smallest: int = 20_000, largest: int = 200_000, shard_mb: int = 64, seed: int = 0
) -> None:
    """Write `number` samples of `smallest` to `largest` bytes (log-uniform) as a dataset at `url`; skip it if it
    exists.
    DataError if `url` contains something else."""
    store = Store(url)
    options: dict[str, Any] = {"number": number, "bytes": [smallest, largest], "shard_mb": shard_mb, "seed": seed}
    claim(store, {"kind": "synthetic", "schema_version": SCHEMA_VERSION, "options": options})
    if store.size(MANIFEST) is not None:
        return
    generator = np.random.default_rng(seed)
    sizes = np.exp(generator.uniform(np.log(smallest), np.log(largest), number)).astype(int).tolist()
    with ShardWriter(store, "small", ShardLimits(shard_mb << 20)) as writer:
        for each, size in enumerate(sizes):
            writer.add(NewSample(f"small-{each:06d}", generator.bytes(size), _DESCRIBED))
    write_manifest(store, [index_name("small", shard) for shard in range(writer.shards)], "synthetic", options)


# Data wait of a training run, from its record.

COLD_LINES = 2  # of the log, at the start


def waited(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the share of step time spent waiting for data after warm-up: over all warm steps, and of the worst log
    line; `step_s` is the median.

    Args:
        lines: log lines in order, each covering the same number of steps.

    Raises:
        DataError: the run ended before it was warm.
    """
    warm = lines[COLD_LINES:]
    if not warm:
        raise DataError(f"the run has {len(lines)} lines of figures; with {COLD_LINES + 1} or more it can be judged")
    waited_s, total_s = sum(line["data_wait"] * line["step_s"] for line in warm), sum(line["step_s"] for line in warm)
    return {
        "data_wait": waited_s / total_s,
        "worst_line": max(line["data_wait"] for line in warm),
        "first_line": lines[0]["data_wait"],
        "step_s": median(line["step_s"] for line in warm),
        "warm_steps": warm[-1]["step"] - lines[COLD_LINES - 1]["step"],
    }


if __name__ == "__main__":
    print(json_text(_MEASURED[sys.argv[1]](**json.loads(sys.argv[2]))))
