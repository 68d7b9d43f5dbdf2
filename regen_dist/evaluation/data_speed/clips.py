"""Training clips per second: the whole loader, beside the same cores decoding the same clips from memory and doing
nothing else."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from typing import TYPE_CHECKING, NamedTuple

from regen_dist.config.schema import DataConfig
from regen_dist.data.order.draws import ClipDraw, draw_clip
from regen_dist.data.reading.clips import clip_geometry
from regen_dist.data.reading.loader import clip_batches
from regen_dist.data.reading.plan import Plan
from regen_dist.data.reading.training_set import TrainingSet
from regen_dist.data.video import reader as video
from regen_dist.evaluation.data_speed.turns import Turn, measured, turn_of
from regen_dist.programs import start_safely

if TYPE_CHECKING:
    from threading import Barrier

WARM_BATCHES = 4  # of each worker, before the clock starts
_READY_S = 120.0  # to read every clip's bytes


class Stretch(NamedTuple):
    """What is measured: `batches` micro-batches of `batch` clips by each of `workers` processes."""

    config: DataConfig
    num_frames: int
    batch: int
    batches: int
    workers: int
    seed: int = 0

    @property
    def first(self) -> int:
        """Step that is measured first; before it the loader warms up."""
        return WARM_BATCHES * self.workers

    def open(self) -> TrainingSet:
        """The samples and their order."""
        config = self.config.model_copy(update={"workers": self.workers})
        return TrainingSet(config, num_frames=self.num_frames, batch_global=self.batch, seed=self.seed)


def through_loader(stretch: Stretch, store: int | None = None) -> Turn:
    """Clips per second of `clip_batches` once warm, taken as fast as they come. `store` is the store's process."""
    batches = clip_batches(stretch.open(), accumulation=1, rank=0, world_size=1, cursor=0)
    try:
        for _ in islice(batches, stretch.first):
            pass
        with measured(store) as costs:
            clips = sum(len(batch.sample_ids) for batch in islice(batches, stretch.batches * stretch.workers))
    finally:
        batches.close()
    return turn_of(clips, costs)


def from_memory(stretch: Stretch) -> Turn:
    """Clips per second of as many processes, each decoding the clips that its counterpart of the loader would, their
    bytes in memory, and letting go of the pixels."""
    start_safely()
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    barrier = context.Barrier(stretch.workers)
    with ProcessPoolExecutor(stretch.workers, context, _keep, (barrier,)) as pool:
        parts = list(pool.map(_decode_part, [stretch] * stretch.workers, range(stretch.workers)))
    seconds = max(part.seconds for part in parts)  # the loader too is as fast as the slowest: its batches have an order
    return Turn(sum(part.clips for part in parts), seconds, {"own_cpu_s": sum(part.cpu_s for part in parts)})


class Clip(NamedTuple):
    """All that decoding takes."""

    data: bytes
    frames: int
    draw: ClipDraw
    geometry: video.Geometry
    flip: bool

    def decode(self) -> video.UInt8s:
        """The clip, uint8 [3, T, H, W]."""
        with video.VideoReader(self.data) as reader:
            numbers = video.clip_frames(reader.table, self.draw.start, self.draw.stride, self.frames)
            return video.read_clip(reader, numbers, self.geometry, flip=self.flip)


def clips_of(stretch: Stretch, worker: int) -> Iterator[Clip]:
    """The clips of the batches that a worker of the loader makes, in its order, with their bytes."""
    data = stretch.open()
    config, stop = data.config, stretch.first + stretch.batches * stretch.workers
    for batch in islice(Plan(data, 0, 1, 0, 1), stretch.first + worker, stop, stretch.workers):
        for (dataset, row), epoch in zip(data.places(batch), batch.epochs.tolist(), strict=True):
            draw = draw_clip(stretch.seed, epoch, row.id, row.frames, batch.bucket.frames, config.stride)
            place = clip_geometry(row.height, row.width, batch.bucket, config.short_side, (draw.crop_y, draw.crop_x))
            data_of_it = data.datasets[dataset].read(row)
            yield Clip(data_of_it, batch.bucket.frames, draw, place, draw.flip and config.flip)


class _Part(NamedTuple):
    clips: int
    seconds: float
    cpu_s: float


_barrier: Barrier | None = None


def _keep(barrier: Barrier) -> None:
    global _barrier
    _barrier = barrier


def _decode_part(stretch: Stretch, worker: int) -> _Part:
    """One process's share; all begin together, once all bytes are there."""
    clips = list(clips_of(stretch, worker))
    assert _barrier is not None, "set as the process starts"
    _barrier.wait(_READY_S)
    begun, cpu = time.perf_counter(), time.process_time()
    for clip in clips:
        clip.decode()
    return _Part(len(clips), time.perf_counter() - begun, time.process_time() - cpu)
