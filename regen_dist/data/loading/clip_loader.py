"""Clip loader for training: samples in data order, prefetched, decoded in worker processes, returned as uint8.

Shapes: b clips of this rank and micro-batch, T frames, H x W pixels of the bucket's crop.
"""

from __future__ import annotations

import os
import re
import signal
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import count
from math import prod
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from regen_dist.data.format.catalogue import Dataset, SampleRow
from regen_dist.data.loading.datasets import TrainingSet
from regen_dist.data.loading.fetch import Fetcher, FetchResult, SampleLocation
from regen_dist.data.loading.plan import (
    BadSample,
    BatchPlan,
    BatchWithReplacements,
    sample_keys,
    take_with_replacements,
)
from regen_dist.data.order.order import Bucket, MicroBatch, draw_clip
from regen_dist.data.pool import end_with_parent
from regen_dist.data.video.conversion import Geometry, UInt8s, fit_geometry
from regen_dist.data.video.reader import VideoReader, read_clip
from regen_dist.data.video.timing import clip_frames
from regen_dist.errors import DataError
from regen_dist.programs import start_safely

# --- decoding: from bytes to cropped, mirrored clips ---


class ClipReader:
    """Decoder of the clips of micro-batches, in one process.

    Args:
        data: samples, order and cropping.
        fetcher: source of the bytes of replacement samples.
        board: int64 [3] in shared memory: the id of this process and the sample it decodes (`decoding_problems`).
    """

    def __init__(self, data: TrainingSet, fetcher: Fetcher, board: Tensor) -> None:
        self._data, self._fetcher = data, fetcher
        self._board = board.numpy()  # torch takes 30 times as long to set a number
        self._board[0] = os.getpid()

    def read(self, batch: MicroBatch, found: Sequence[FetchResult], out: UInt8s) -> BatchWithReplacements:
        """Decode a micro-batch, with replacements for its bad samples, into `out`, [b, 3, T, H, W].

        Raises:
            DataError: a sample and all its possible replacements are bad.
        """

        def decode(slot: int, place: SampleLocation, data: bytes) -> None:
            self._board[1], self._board[2] = place.dataset, place.row.row
            try:
                self._decode_bytes(batch, slot, place.row, data, out[slot])
            finally:
                self._board[1] = ~place.dataset

        return take_with_replacements(self._data, self._fetcher, batch, found, decode)

    def _decode_bytes(self, batch: MicroBatch, slot: int, row: SampleRow, data: bytes, out: UInt8s) -> None:
        config, frames = self._data.config, batch.bucket.frames
        draw = draw_clip(self._data.seed, int(batch.epochs[slot]), row.id, row.frames, frames, config.stride)
        geometry = clip_geometry(row.height, row.width, batch.bucket, config.short_side, (draw.crop_y, draw.crop_x))
        with VideoReader(data) as reader:
            numbers = clip_frames(reader.table, draw.start, draw.stride, frames)
            read_clip(reader, numbers, geometry, flip=draw.flip and config.flip, out=out)


def decoding_problems(board: Sequence[int]) -> tuple[int, int, bool] | None:
    """Return the (dataset, row) that a process decoded last, and whether it still does, from its entry on the board;
    None if it has decoded nothing."""
    _, dataset, row = board
    return None if row < 0 else (dataset if dataset >= 0 else ~dataset, row, dataset >= 0)


def clip_geometry(
    height: int, width: int, bucket: Bucket, short_side: int | str | None, crop: tuple[float, float] = (0.5, 0.5)
) -> Geometry:
    """Compute how frames of `height` x `width` become a bucket's crop; `short_side` as in `DataConfig`."""
    size = (bucket.height, bucket.width)
    if short_side == "fit":  # resize to the smallest frame that contains the crop
        scale = max(size[0] / height, size[1] / width)
        height, width = max(size[0], round(height * scale)), max(size[1], round(width * scale))
        return fit_geometry(height, width, size, None, *crop)
    assert short_side is None or isinstance(short_side, int), "the config knows no other word"
    return fit_geometry(height, width, size, short_side, *crop)


# --- shared memory for batches, reused: writing to new pages, and freeing them, costs several times more ---

NONE = -1
_made_here: weakref.WeakValueDictionary[int, Slots] = weakref.WeakValueDictionary()
_numbers = count()


class Slots:
    """Shared memory slots for the batches of each worker, created by the rank and filled by its workers.

    A worker takes one of its free slots; the rank frees it once nothing refers to the batch any more. Nobody waits: if
    no slot is free, the next batch gets separate memory. Sent to workers by file descriptor.

    Args:
        workers: decoding processes; with 0 there is nothing to share.
        each: slots of a worker.
        batch_bytes: size of the largest batch.

    Raises:
        DataError: the machine has too little shared memory.
    """

    def __init__(self, workers: int, each: int, batch_bytes: int) -> None:
        self._each, self._number = each, next(_numbers)
        _made_here[self._number] = self
        self._room = _shared(workers * each * batch_bytes).view(workers * each, batch_bytes)
        self._taken = _shared(workers * each).zero_()

    def take(self, worker: int, shape: Sequence[int]) -> tuple[Tensor, int]:
        """Return, in a worker, an uninitialised uint8 tensor of this shape and the number of its slot (NONE if it has
        none)."""
        if not len(self._taken):
            return torch.empty(*shape, dtype=torch.uint8), NONE
        slot = self._free(worker)
        return _shared(prod(shape)).view(*shape) if slot == NONE else self.view(slot, shape), slot

    def sent(self, video: Tensor, slot: int) -> Tensor | Sent:
        """Return, in a worker, the object that is sent to the rank in place of a batch."""
        return video if slot == NONE else Sent(self._number, slot, tuple(video.shape))

    def view(self, slot: int, shape: Sequence[int]) -> Tensor:
        """Return the content of a slot as uint8 of this shape."""
        return self._room[slot, : prod(shape)].view(*shape)

    def lend(self, video: Tensor, slot: int, *, copied: bool) -> Tensor:
        """Return, in the rank, the same clips; their slot is freed once no view of them is left, or at once if they are
        `copied`."""
        if slot == NONE:
            return video
        if copied:
            self._taken[slot] = 0
            return video
        pixels = video.numpy()
        weakref.finalize(pixels, self._taken.numpy().__setitem__, slot, 0).atexit = False
        return torch.from_numpy(pixels)  # keeps `pixels` alive as long as its storage

    def _free(self, worker: int) -> int:
        """Take a free slot of a worker; only the worker itself calls this."""
        for slot in range(worker * self._each, (worker + 1) * self._each):
            if not self._taken[slot]:
                self._taken[slot] = 1
                return slot
        return NONE


class Sent:
    """Reference to a batch in a slot, which unpickles in the rank as a tensor of the mapped slot. Sending the tensor
    itself would pass a file descriptor through a socket each time."""

    def __init__(self, slots: int, slot: int, shape: tuple[int, ...]) -> None:
        self._place = slots, slot, shape

    def __reduce__(self) -> tuple[Callable[[int, int, tuple[int, ...]], Tensor], tuple[int, int, tuple[int, ...]]]:
        return _arrived, self._place


def _arrived(slots: int, slot: int, shape: tuple[int, ...]) -> Tensor:
    return _made_here[slots].view(slot, shape)


def _shared(size: int) -> Tensor:
    """Allocate bytes [size] of shared memory now, so that a shortage raises here. The DataLoader would allocate it in a
    thread, print the error, and wait for the batch forever."""
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


_DEAD = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:exited|is killed)")  # torch's error text
_DEATH_S = 2.0  # a dead worker's connection breaks at once, but its exit is only known shortly after


class ClipBatch(NamedTuple):
    """Clips of one micro-batch.

    `video` is uint8 RGB [b, 3, T, H, W]; `sample_ids` int64 [b] are the dataset's, independent of the rank; `epochs`
    int64 [b] count how often each sample has occurred before (None: never). `bad` are the samples found to be bad, and
    `num_replaced` the number of clips that come from replacement samples; `problem` another message about reading,
    given once.
    """

    video: Tensor
    sample_ids: Tensor
    epochs: Tensor | None = None
    bad: tuple[BadSample, ...] = ()
    num_replaced: int = 0
    problem: str | None = None

    @property
    def keys(self) -> Tensor:
        """Return the RNG key of each clip, int64 [b] (see `sample_keys`)."""
        return sample_keys(self.sample_ids, self.epochs)

    @property
    def kind(self) -> str:
        """Return frames and sides, as "17x64x64": equal for all batches of a step; losses of different kinds differ."""
        return "x".join(map(str, self.video.shape[2:]))


def clip_batches(
    data: TrainingSet, *, accumulation: int, rank: int, world_size: int, cursor: int
) -> Generator[ClipBatch]:
    """Yield this rank's micro-batches endlessly: `accumulation` of them for each step, from the step that starts at
    `cursor`.

    The union over ranks and micro-batches of a step is the same for every world size and every number of workers,
    and a run resumed at a cursor continues with exactly the batches of an uninterrupted one.

    Args:
        data: the samples and their order.
        cursor: samples consumed so far by all ranks: a multiple of the global batch.

    Yields:
        batches of `batch_global / (world_size * accumulation)` clips. Close the iterator to end its workers.

    Raises:
        ConfigError: the batch does not divide, or the cursor is not a multiple of it.
        DataError: a sample and all its possible replacements are bad, a worker died, or the store does not answer.
    """
    plan = BatchPlan.from_cursor(data, accumulation=accumulation, rank=rank, world_size=world_size, cursor=cursor)
    return _iterate(plan)


def _slots(plan: BatchPlan[TrainingSet]) -> Slots:
    """Allocate slots for the batches that the workers prepare ahead and those that the receiver still uses."""
    config = plan.data.config
    values = max(3 * prod(bucket) for bucket in plan.data.buckets)
    return Slots(config.workers, config.prefetch + 2, plan.samples * values)


class _WorkerBatch(NamedTuple):
    """Batch sent by a worker: small fields are pickled, the clips are in a slot of shared memory."""

    video: Tensor | Sent  # `Sent` in the worker, a tensor in the rank
    slot: int
    sample_ids: list[int]
    epochs: list[int]
    bad: tuple[BadSample, ...]
    num_replaced: int
    problem: str | None


class _Clips(IterableDataset[_WorkerBatch | DataError]):
    """Iterable dataset in the workers, each of which reads every n-th micro-batch.

    An error is yielded as an item: raised in a worker, it would lose its message. `board` holds for each worker its
    process id and the dataset and row that it decodes, so that a message can name the sample that killed a worker.
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
                mine = self._plan.part(number, workers)
                for batch, found in fetcher.ahead((batch, data.places(batch)) for batch in mine):
                    height, width, frames = batch.bucket
                    video, slot = self._slots.take(number, (len(found), 3, frames, height, width))
                    places, bad, num_replaced = reader.read(batch, found, video.numpy())
                    ids = [place.row.id for place in places]
                    sent = self._slots.sent(video, slot)
                    yield _WorkerBatch(sent, slot, ids, batch.epochs.tolist(), bad, num_replaced, fetcher.problem)
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
        generator=torch.Generator(),  # separate: the run's random state must not depend on the loader
    )


def _context() -> object:
    """Return the multiprocessing context: workers are forked from a server process that imports this module once,
    because a fork of the rank would copy its threads."""
    start_safely()
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _identity(item: Any) -> Any:
    return item


def _start_worker(_: int) -> None:
    """Ignore stop signals in a worker: they reach every process of a job, but the rank handles them and ends its
    workers."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
        signal.signal(signal.Signals[name], signal.SIG_IGN)
    end_with_parent()
    torch.set_num_threads(1)


def _iterate(plan: BatchPlan[TrainingSet]) -> Generator[ClipBatch]:
    board = _shared(8 * 3 * max(1, plan.data.config.workers)).view(torch.int64).view(-1, 3).fill_(-1)
    slots = _slots(plan)
    batches = iter(_loader(plan, board, slots))
    try:
        while True:
            try:
                made = next(batches)
            except (RuntimeError, OSError, EOFError) as error:
                if not (dead := _dead_workers(error, batches)):
                    raise
                raise DataError(_dead_workers_message(dead, board, plan.data.datasets)) from error
            if isinstance(made, DataError):
                raise made
            yield _received(made, slots)
    finally:
        # Workers ignore milder signals and would finish their work first, which takes minutes with a slow store. They
        # hold no state.
        for worker in _workers(batches):
            worker.kill()


def _workers(batches: object) -> Sequence[BaseProcess]:
    return getattr(batches, "_workers", ())


def _dead_workers(error: Exception, batches: object) -> list[int]:
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
    assert isinstance(made.video, Tensor), "unpickled in the rank"
    video = slots.lend(made.video, made.slot, copied=torch.cuda.is_available())
    ids, epochs = torch.tensor([made.sample_ids, made.epochs], dtype=torch.int64)
    return ClipBatch(video, ids, epochs, made.bad, made.num_replaced, made.problem)


def _dead_workers_message(dead: Sequence[int], board: Tensor, datasets: tuple[Dataset, ...]) -> str:
    notes = [decoding_problems(row) for row in board.tolist() if row[0] in dead]
    samples = [
        f"{'while it decoded' if still else 'between two samples, the last was'} {name_of(datasets[dataset], row)}"
        for dataset, row, still in filter(None, notes)
    ]
    pids = ", ".join(map(str, dead))
    return (
        f"a decoding process died {', '.join(samples) or 'before its first sample'} (process {pids}). "
        "If it was killed for memory, lower data.workers, data.prefetch or data.read.ahead_mb; if it is the video, "
        "build its shard again without it"
    )


def name_of(dataset: Dataset, row: int) -> str:
    """Return a sample's name for a message, or its row if the index cannot be read."""
    try:
        return dataset.sample(row).name
    except DataError:
        return f"row {row} of {dataset.row(row).shard}"
