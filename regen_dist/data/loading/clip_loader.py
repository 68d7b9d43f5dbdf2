"""Clips for training: rows of the order, fetched ahead, decoded in worker processes, handed over as uint8.

Shapes: b clips of this rank and micro-batch, T frames, H x W pixels of the bucket's crop.
"""

from __future__ import annotations

import os
import re
import signal
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import count, islice
from math import prod
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from regen_dist.data.format.catalogue import Dataset, SampleRow
from regen_dist.data.loading.datasets import TrainingSet
from regen_dist.data.loading.fetch import Bytes, Fetcher, SampleLocation
from regen_dist.data.loading.plan import (
    BadSample,
    BatchPlan,
    BatchWithReplacements,
    sample_keys,
    take_with_replacements,
)
from regen_dist.data.order.mixture import Bucket
from regen_dist.data.order.order import MicroBatch, draw_clip
from regen_dist.data.pool import end_with_parent
from regen_dist.data.video import reader as video
from regen_dist.errors import DataError
from regen_dist.programs import start_safely

if TYPE_CHECKING:
    from regen_dist.data.loading.datasets import TrainingSet


# From bytes to clips: decode, crop, mirror.


class ClipReader:
    """Decodes the clips of micro-batches, in one process.

    Args:
        data: samples, order and how clips are cut.
        fetcher: where a stand-in's bytes come from.
        board: int64 [3], where this process notes its id and what it is decoding (see `decoding`).
    """

    def __init__(self, data: TrainingSet, fetcher: Fetcher, board: Tensor) -> None:
        self._data, self._fetcher, self._board = data, fetcher, board
        board[0] = os.getpid()

    def read(self, batch: MicroBatch, found: Sequence[Bytes], out: video.UInt8s) -> BatchWithReplacements:
        """Decode a micro-batch, or what stands in for its bad samples (`take_all`), into `out`, [b, 3, T, H, W].

        Raises:
            DataError: a sample is bad, and so is everything that could stand in for it.
        """

        def decode(slot: int, place: SampleLocation, data: bytes) -> None:
            self._board[1], self._board[2] = place.dataset, place.row.row
            try:
                self._decode_bytes(batch, slot, place.row, data, out[slot])
            finally:
                self._board[1] = ~place.dataset

        return take_with_replacements(self._data, self._fetcher, batch, found, decode)

    def _decode_bytes(self, batch: MicroBatch, slot: int, row: SampleRow, data: bytes, out: video.UInt8s) -> None:
        config, frames = self._data.config, batch.bucket.frames
        draw = draw_clip(self._data.seed, int(batch.epochs[slot]), row.id, row.frames, frames, config.stride)
        geometry = clip_geometry(row.height, row.width, batch.bucket, config.short_side, (draw.crop_y, draw.crop_x))
        with video.VideoReader(data) as reader:
            numbers = video.clip_frames(reader.table, draw.start, draw.stride, frames)
            video.read_clip(reader, numbers, geometry, flip=draw.flip and config.flip, out=out)


def decoding_problems(board: Sequence[int]) -> tuple[int, int, bool] | None:
    """What a process noted on its board: the (dataset, row) that it decoded last, and whether it still does. None:
    it has decoded nothing."""
    _, dataset, row = board
    return None if row < 0 else (dataset if dataset >= 0 else ~dataset, row, dataset >= 0)


def clip_geometry(
    height: int, width: int, bucket: Bucket, short_side: int | str | None, crop: tuple[float, float] = (0.5, 0.5)
) -> video.Geometry:
    """How frames of `height` x `width` become a bucket's crop; `short_side` as in `DataConfig`."""
    size = (bucket.height, bucket.width)
    if short_side == "fit":  # the smallest frame that the crop fits into
        scale = max(size[0] / height, size[1] / width)
        height, width = max(size[0], round(height * scale)), max(size[1], round(width * scale))
        return video.fit_geometry(height, width, size, None, *crop)
    assert short_side is None or isinstance(short_side, int), "the config knows no other word"
    return video.fit_geometry(height, width, size, short_side, *crop)


# Shared memory for batches, used again and again: filling a page that is new costs several times what filling it anew
# does, and so does giving it back.

NONE = -1
_made_here: weakref.WeakValueDictionary[int, Slots] = weakref.WeakValueDictionary()
_numbers = count()


class Slots:
    """Room for some batches of each worker. A rank makes it, its workers fill it; crosses to them by file descriptor.

    A worker takes a free slot of its own; the rank gives it back when nothing refers to the batch any more. So nobody
    waits: where a batch is kept and no slot is free, the next one gets memory of its own.

    Args:
        workers: decoding processes; with 0 there is nothing to share.
        each: slots of a worker.
        batch_bytes: of the largest batch.

    Raises:
        DataError: the machine has no such room.
    """

    def __init__(self, workers: int, each: int, batch_bytes: int) -> None:
        self._each, self._number = each, next(_numbers)
        _made_here[self._number] = self
        self._room = _shared(workers * each * batch_bytes).view(workers * each, batch_bytes)
        self._taken = torch.zeros(workers * each, dtype=torch.uint8).share_memory_()

    def take(self, worker: int, shape: Sequence[int]) -> tuple[Tensor, int]:
        """In a worker: room for a batch of uint8 of this shape, not set to anything, and the number of its slot (NONE:
        it has none)."""
        if not len(self._taken):
            return torch.empty(*shape, dtype=torch.uint8), NONE
        slot = self._free(worker)
        return _shared(prod(shape)).view(*shape) if slot == NONE else self.view(slot, shape), slot

    def sent(self, video: Tensor, slot: int) -> Tensor | Sent:
        """In a worker: what goes to the rank in place of a batch."""
        return video if slot == NONE else Sent(self._number, slot, tuple(video.shape))

    def view(self, slot: int, shape: Sequence[int]) -> Tensor:
        """What lies in a slot, uint8 of this shape."""
        return self._room[slot, : prod(shape)].view(*shape)

    def lend(self, video: Tensor, slot: int, *, copied: bool) -> Tensor:
        """In the rank: the same clips, which give their slot back when neither they nor any view of them is left; at
        once where they are `copied`."""
        if slot == NONE:
            return video
        if copied:
            self._taken[slot] = 0
            return video
        pixels = video.numpy()
        weakref.finalize(pixels, self._taken.numpy().__setitem__, slot, 0).atexit = False
        return torch.from_numpy(pixels)  # holds on to `pixels` as long as its storage lives

    def _free(self, worker: int) -> int:
        """Takes a free slot of a worker. Only the worker itself does."""
        for slot in range(worker * self._each, (worker + 1) * self._each):
            if not self._taken[slot]:
                self._taken[slot] = 1
                return slot
        return NONE


class Sent:
    """A batch on its way to the rank, where it arrives as a tensor: the rank has its slot mapped. To send the tensor
    itself would take a file descriptor through a socket each time."""

    def __init__(self, slots: int, slot: int, shape: tuple[int, ...]) -> None:
        self._place = slots, slot, shape

    def __reduce__(self) -> tuple[Callable[[int, int, tuple[int, ...]], Tensor], tuple[int, int, tuple[int, ...]]]:
        return _arrived, self._place


def _arrived(slots: int, slot: int, shape: tuple[int, ...]) -> Tensor:
    return _made_here[slots].view(slot, shape)


def _shared(size: int) -> Tensor:
    """Bytes [size] in shared memory, which the system has set aside: a lack of them shows now. Left to itself, the
    loader would move a batch there in a thread, where that is printed, and the batch waited for without end."""
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    try:
        storage = torch.UntypedStorage._new_shared(size)
    except RuntimeError as error:
        raise DataError(
            f"no shared memory for {size / 1e6:.1f} MB of clips ({str(error).splitlines()[0]}): give this machine or "
            "container more of it (docker run --shm-size), or lower data.prefetch or data.workers"
        ) from error
    return torch.empty(0, dtype=torch.uint8).set_(storage)


_DEAD = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:exited|is killed)")  # in torch's words
_DEATH_S = 2.0  # a connection that a dead worker held breaks at once; that it died is known a moment later


class ClipBatch(NamedTuple):
    """Clips of one micro-batch.

    `video` is uint8 RGB [b, 3, T, H, W]; `sample_ids` int64 [b] are the dataset's own, whatever the rank; `epochs`
    int64 [b] tell how often each sample has come before (None: never). `bad` are the samples that were found to be bad,
    and `stand_ins` how many of the clips come from others in their place; `problem` what else should be known (once) of
    the reading.
    """

    video: Tensor
    sample_ids: Tensor
    epochs: Tensor | None = None
    bad: tuple[BadSample, ...] = ()
    stand_ins: int = 0
    problem: str | None = None

    @property
    def keys(self) -> Tensor:
        """What the randomness of each clip is keyed by, int64 [b] (see `sample_keys`)."""
        return sample_keys(self.sample_ids, self.epochs)

    @property
    def kind(self) -> str:
        """Frames and sides, as "17x64x64": the same for all batches of a step; losses of different kinds differ."""
        return "x".join(map(str, self.video.shape[2:]))


def clip_batches(
    data: TrainingSet, *, accumulation: int, rank: int, world_size: int, cursor: int
) -> Generator[ClipBatch]:
    """This rank's micro-batches, without end: `accumulation` of them for each global step, from the step that
    starts at `cursor`.

    The union over ranks and micro-batches of a step is the same for every world size and every number of workers,
    and a run resumed at a cursor goes on with exactly the batches that an uninterrupted one would have had.

    Args:
        data: the samples and their order.
        cursor: samples consumed so far by all ranks: a multiple of the global batch.

    Yields:
        batches of `batch_global / (world_size * accumulation)` clips. Close the iterator to end its workers.

    Raises:
        ConfigError: the batch does not divide, or the cursor is not a multiple of it.
        DataError: a sample and all that could stand in for it are bad, a worker died, or the store does not answer.
    """
    plan = BatchPlan.from_cursor(data, accumulation=accumulation, rank=rank, world_size=world_size, cursor=cursor)
    return _iterate(plan)


def _slots(plan: BatchPlan[TrainingSet]) -> Slots:
    """Room for what the workers prepare ahead, and for what the receiver still looks at."""
    config = plan.data.config
    values = max(3 * prod(bucket) for bucket in plan.data.buckets)
    return Slots(config.workers, config.prefetch + 2, plan.samples * values)


class _WorkerBatch(NamedTuple):
    """A batch on its way from a worker: what is small goes as it is, the clips by shared memory, in a slot."""

    video: Tensor | Sent  # `Sent` by a worker, and a tensor where it arrives
    slot: int
    sample_ids: list[int]
    epochs: list[int]
    bad: tuple[BadSample, ...]
    stand_ins: int
    problem: str | None


def _sides(batch: MicroBatch) -> tuple[int, int, int]:
    """T, H, W of its clips."""
    return batch.bucket.frames, batch.bucket.height, batch.bucket.width


class _Clips(IterableDataset[_WorkerBatch | DataError]):
    """Reads every n-th micro-batch; runs in the workers.

    An error is handed over as an item: raised in a worker, it would lose its message. `board` tells, for each worker,
    its process and what it decodes (process id, dataset, row), so that a dead one can be asked what killed it.
    """

    def __init__(self, plan: BatchPlan[TrainingSet], board: Tensor, slots: Slots) -> None:
        self._plan, self._board, self._slots = plan, board, slots

    def __iter__(self) -> Iterator[_WorkerBatch | DataError]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        data, board = self._plan.data, self._board[number]
        try:
            with Fetcher(data.datasets, data.config.read) as fetcher:
                reader = ClipReader(data, fetcher, board)
                mine = islice(self._plan, number, None, workers)
                for batch, found in fetcher.ahead((batch, data.places(batch)) for batch in mine):
                    video, slot = self._slots.take(number, (len(found), 3, *_sides(batch)))
                    places, bad, stand_ins = reader.read(batch, found, video.numpy())
                    ids = [place.row.id for place in places]
                    sent = self._slots.sent(video, slot)
                    yield _WorkerBatch(sent, slot, ids, batch.epochs.tolist(), bad, stand_ins, fetcher.problem)
        except DataError as error:
            yield error


def _loader(plan: BatchPlan[TrainingSet], board: Tensor, slots: Slots) -> DataLoader[_WorkerBatch | DataError]:
    config = plan.data.config
    return DataLoader(
        _Clips(plan, board, slots),
        batch_size=None,
        num_workers=config.workers,
        prefetch_factor=config.prefetch if config.workers else None,
        multiprocessing_context=_context() if config.workers else None,
        collate_fn=_identity,
        worker_init_fn=_start_worker,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # its own: the run's random state must not depend on the loader
    )


def _context() -> object:
    """Workers come from a fresh server process that has imported this module once: a fork of the rank would carry
    its threads."""
    start_safely()
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


def _iterate(plan: BatchPlan[TrainingSet]) -> Generator[ClipBatch]:
    board = torch.full((max(1, plan.data.config.workers), 3), -1, dtype=torch.int64).share_memory_()
    slots = _slots(plan)
    batches = iter(_loader(plan, board, slots))
    try:
        while True:
            try:
                made = next(batches)
            except (RuntimeError, OSError, EOFError) as error:
                if not (dead := _dead_workers(error, batches)):
                    raise
                raise DataError(_obituary(dead, board, plan.data.datasets)) from error
            if isinstance(made, DataError):
                raise made
            yield _received(made, slots)
    finally:
        # They ignore milder signals, and would first end what they do: minutes, where the store is slow. They hold
        # nothing that is worth keeping.
        for worker in _workers(batches):
            worker.kill()


def _workers(batches: object) -> Sequence[BaseProcess]:
    return getattr(batches, "_workers", ())


def _dead_workers(error: Exception, batches: object) -> list[int]:
    """Process ids of the workers whose death an error tells of."""
    if found := _DEAD.search(str(error)):
        return [int(number) for number in re.findall(r"\d+", found[1])]
    if isinstance(error, RuntimeError):
        return []
    deadline = time.monotonic() + _DEATH_S
    while (workers := _workers(batches)) and time.monotonic() < deadline:
        if dead := [worker.pid for worker in workers if worker.pid is not None and not worker.is_alive()]:
            return dead
        time.sleep(0.01)
    return []


def _received(made: _WorkerBatch, slots: Slots) -> ClipBatch:
    assert isinstance(made.video, Tensor), "it has arrived"
    video = slots.lend(made.video, made.slot, copied=torch.cuda.is_available())
    ids, epochs = torch.tensor([made.sample_ids, made.epochs], dtype=torch.int64)
    return ClipBatch(video, ids, epochs, made.bad, made.stand_ins, made.problem)


def _obituary(dead: Sequence[int], board: Tensor, datasets: tuple[Dataset, ...]) -> str:
    """What to say of workers that died (their process ids): the samples that they were decoding."""
    notes = [decoding_problems(row) for row in board.tolist() if row[0] in dead]
    told = [
        f"{'while it decoded' if still else 'between two samples, the last was'} {name_of(datasets[dataset], row)}"
        for dataset, row, still in filter(None, notes)
    ]
    pids = ", ".join(map(str, dead))
    return (
        f"a decoding process died {', '.join(told) or 'before its first sample'} (process {pids}). "
        "If it was killed for memory, lower data.workers, data.prefetch or data.read.ahead_mb; if it is the video, "
        "build its shard again without it"
    )


def name_of(dataset: Dataset, row: int) -> str:
    """A sample's name for a message, as far as it can be had."""
    try:
        return dataset.sample(row).name
    except DataError:
        return f"row {row} of {dataset.row(row).shard}"
