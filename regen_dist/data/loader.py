"""Clips for training: rows of the order, read by the index, decoded in worker processes, handed over as uint8.

Shapes: b clips of this rank and micro-batch, T frames, H x W pixels of the crop.
"""

from __future__ import annotations

import signal
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from regen_dist.config.schema import DataConfig
from regen_dist.data import index, video
from regen_dist.data.order import MicroBatch, Order, draw_clip, micro_batch_size
from regen_dist.data.pool import end_with_parent
from regen_dist.data.store import Store
from regen_dist.errors import ConfigError, DataError

_VALIDATION_CLIPS = 4


class ClipBatch(NamedTuple):
    """Clips of one micro-batch: `video` uint8 RGB [b, 3, T, H, W]; `sample_ids` int64 [b], the dataset's own,
    whatever the rank."""

    video: Tensor
    sample_ids: Tensor


def clip_batches(
    config: DataConfig,
    *,
    num_frames: int,
    batch_global: int,
    accumulation: int,
    seed: int,
    rank: int,
    world_size: int,
    cursor: int,
) -> Generator[ClipBatch]:
    """This rank's micro-batches, without end: `accumulation` of them for each global step, from the step that
    starts at `cursor`.

    The union over ranks and micro-batches of a step is the same for every world size and every number of workers,
    and a run resumed at a cursor goes on with exactly the batches that an uninterrupted one would have had.

    Args:
        config: where the clips are and how they are cut.
        num_frames: frames of a clip (k + 1); steps chosen by `config.image_fraction` have one.
        cursor: samples consumed so far by all ranks: a multiple of `batch_global`.

    Yields:
        batches of `batch_global / (world_size * accumulation)` clips. Close the iterator to end its workers.

    Raises:
        ConfigError: the batch does not divide, or the cursor is not a multiple of it.
        DataError: the dataset cannot be opened, or a sample is bad (the message names shard and key).
    """
    micro_batch_size(batch_global, accumulation, world_size)
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank {rank} is not in [0, {world_size})")
    dataset = index.open_dataset(config.url)
    order = Order(len(dataset), batch_global, seed, config.image_fraction)
    plan = _Plan(order, order.step_of(cursor), accumulation, rank, world_size)
    return _iterate(_loader(_Clips(dataset, config, num_frames, seed), plan, config), plan)


def dataset_fingerprint(config: DataConfig) -> str:
    """Identity of the training data: changes when a sample, its bytes or their order do. A cursor belongs to one
    fingerprint."""
    return index.read_manifest(Store(config.url)).fingerprint


def validation_clip(config: DataConfig, *, num_frames: int) -> ClipBatch:
    """One to four fixed clips, spread over the validation data (the training data where there is none).

    First frames, stride 1, centre crop of `config.validation_size`, not mirrored. Read in this process.
    """
    dataset = index.open_dataset(config.validation_url or config.url)
    number = min(_VALIDATION_CLIPS, len(dataset))
    samples = [dataset.sample(row * len(dataset) // number) for row in range(number)]
    larger = config.model_copy(update={"size": config.validation_size or config.size})
    clips = [_read(dataset, sample, range(num_frames), larger) for sample in samples]
    return _batch(clips, samples)


class _Plan(Sampler[MicroBatch]):
    """The micro-batches of one rank, in order, without end."""

    def __init__(self, order: Order, first_step: int, accumulation: int, rank: int, world_size: int) -> None:
        self._order, self._first_step, self._accumulation = order, first_step, accumulation
        self._rank, self._world_size = rank, world_size

    def __iter__(self) -> Iterator[MicroBatch]:
        for step in count(self._first_step):
            for micro in range(self._accumulation):
                yield self._order.micro_batch(step, micro, self._accumulation, self._rank, self._world_size)


class _Clips(Dataset[ClipBatch | DataError]):
    """Reads one micro-batch; runs in the workers. A bad sample is returned as its error: raised here, it would
    lose its message."""

    def __init__(self, dataset: index.Dataset, config: DataConfig, num_frames: int, seed: int) -> None:
        self._dataset, self._config, self._num_frames, self._seed = dataset, config, num_frames, seed

    def __getitem__(self, batch: MicroBatch) -> ClipBatch | DataError:
        try:
            samples = [self._dataset.sample(int(row)) for row in batch.rows]
            return _batch(
                [
                    self._clip(sample, int(epoch), batch.image)
                    for sample, epoch in zip(samples, batch.epochs, strict=True)
                ],
                samples,
            )
        except DataError as error:
            return error

    def _clip(self, sample: index.Sample, epoch: int, image: bool) -> video.UInt8s:
        num_frames = 1 if image else self._num_frames
        with _named(sample):
            draw = draw_clip(self._seed, epoch, sample.id, sample.frames, num_frames, self._config.stride)
        numbers = range(draw.start, draw.start + draw.stride * num_frames, draw.stride)
        flip = draw.flip and self._config.flip
        return _read(self._dataset, sample, numbers, self._config, crop=(draw.crop_y, draw.crop_x), flip=flip)


@contextmanager
def _named(sample: index.Sample) -> Iterator[None]:
    """Adds shard and key to a DataError."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{sample.name}: {error}") from error


def _read(
    dataset: index.Dataset,
    sample: index.Sample,
    numbers: range,
    config: DataConfig,
    *,
    crop: tuple[float, float] = (0.5, 0.5),
    flip: bool = False,
) -> video.UInt8s:
    """One clip, uint8 [3, T, H, W]."""
    data = dataset.read(sample)
    geometry = video.fit_geometry(sample.height, sample.width, config.size, config.short_side, *crop)
    with _named(sample), video.VideoReader(data) as reader:
        return video.read_clip(reader, numbers, geometry, flip=flip)


def _batch(clips: list[video.UInt8s], samples: list[index.Sample]) -> ClipBatch:
    ids = torch.tensor([sample.id for sample in samples], dtype=torch.int64)
    return ClipBatch(torch.from_numpy(np.stack(clips)), ids)


def _loader(clips: _Clips, plan: _Plan, config: DataConfig) -> DataLoader[ClipBatch | DataError]:
    workers = config.workers
    return DataLoader(
        clips,
        batch_size=None,
        sampler=plan,
        num_workers=workers,
        prefetch_factor=config.prefetch if workers else None,
        multiprocessing_context=_context() if workers else None,
        collate_fn=_identity,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # its own: the run's random state must not depend on the loader
    )


def _context() -> object:
    """Workers come from a fresh server process that has imported this module once: a fork of the rank would carry
    its threads."""
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _identity(item: Any) -> Any:
    return item


def _start_worker(_: int) -> None:
    """Signals that ask the run to stop go to every process of a job: only the rank itself answers them, then ends
    its workers."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
        signal.signal(signal.Signals[name], signal.SIG_IGN)
    end_with_parent()
    torch.set_num_threads(1)


def _iterate(loader: DataLoader[ClipBatch | DataError], plan: _Plan) -> Generator[ClipBatch]:
    batches = iter(loader)
    for expected in plan:
        try:
            batch = next(batches)
        except RuntimeError as error:
            rows = ", ".join(map(str, expected.rows[:8]))
            raise DataError(f"a decoding process died before step {expected.step} (rows {rows}): {error}") from error
        if isinstance(batch, DataError):
            raise batch
        yield batch
