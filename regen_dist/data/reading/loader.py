"""Clips for training: rows of the order, fetched ahead, decoded in worker processes, handed over as uint8.

Shapes: b clips of this rank and micro-batch, T frames, H x W pixels of the bucket's crop.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Generator, Iterator, Sequence
from itertools import islice
from math import prod
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from regen_dist.data.dataset.catalogue import Dataset
from regen_dist.data.order.order import MicroBatch
from regen_dist.data.pool import end_with_parent
from regen_dist.data.reading.clips import ClipReader, decoding
from regen_dist.data.reading.fetching import Fetcher
from regen_dist.data.reading.keys import sample_keys
from regen_dist.data.reading.plan import Plan
from regen_dist.data.reading.slots import Sent, Slots
from regen_dist.data.reading.stand_ins import BadSample
from regen_dist.data.reading.training_set import TrainingSet
from regen_dist.errors import DataError
from regen_dist.programs import start_safely

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
    plan = Plan.from_cursor(data, accumulation=accumulation, rank=rank, world_size=world_size, cursor=cursor)
    return _iterate(plan)


def _slots(plan: Plan[TrainingSet]) -> Slots:
    """Room for what the workers prepare ahead, and for what the receiver still looks at."""
    config = plan.data.config
    values = max(3 * prod(bucket) for bucket in plan.data.buckets)
    return Slots(config.workers, config.prefetch + 2, plan.samples * values)


class _Made(NamedTuple):
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


class _Clips(IterableDataset[_Made | DataError]):
    """Reads every n-th micro-batch; runs in the workers.

    An error is handed over as an item: raised in a worker, it would lose its message. `board` tells, for each worker,
    its process and what it decodes (process id, dataset, row), so that a dead one can be asked what killed it.
    """

    def __init__(self, plan: Plan[TrainingSet], board: Tensor, slots: Slots) -> None:
        self._plan, self._board, self._slots = plan, board, slots

    def __iter__(self) -> Iterator[_Made | DataError]:
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
                    yield _Made(sent, slot, ids, batch.epochs.tolist(), bad, stand_ins, fetcher.problem)
        except DataError as error:
            yield error


def _loader(plan: Plan[TrainingSet], board: Tensor, slots: Slots) -> DataLoader[_Made | DataError]:
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


def _iterate(plan: Plan[TrainingSet]) -> Generator[ClipBatch]:
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


def _received(made: _Made, slots: Slots) -> ClipBatch:
    assert isinstance(made.video, Tensor), "it has arrived"
    video = slots.lend(made.video, made.slot, copied=torch.cuda.is_available())
    ids, epochs = torch.tensor([made.sample_ids, made.epochs], dtype=torch.int64)
    return ClipBatch(video, ids, epochs, made.bad, made.stand_ins, made.problem)


def _obituary(dead: Sequence[int], board: Tensor, datasets: tuple[Dataset, ...]) -> str:
    """What to say of workers that died (their process ids): the samples that they were decoding."""
    notes = [decoding(row) for row in board.tolist() if row[0] in dead]
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
