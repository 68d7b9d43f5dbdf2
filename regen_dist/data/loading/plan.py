"""Which micro-batches one rank reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any, Generic, NamedTuple, TypeVar

from torch import Tensor

from regen_dist.config.identity import micro_batch_size
from regen_dist.data.loading.datasets import SampleSet
from regen_dist.data.loading.fetch import Bytes, Fetcher, SampleLocation
from regen_dist.data.order.order import MicroBatch
from regen_dist.errors import ConfigError, DataError

Data = TypeVar("Data", bound=SampleSet[Any])


class BatchPlan(Generic[Data]):
    """The micro-batches of one rank, in order, without end; any part of them can be begun anew."""

    def __init__(self, data: Data, first_step: int, accumulation: int, rank: int, world_size: int) -> None:
        self.data = data
        self._first_step, self._accumulation = first_step, accumulation
        self._rank, self._world_size = rank, world_size

    @classmethod
    def from_cursor(cls, data: Data, *, accumulation: int, rank: int, world_size: int, cursor: int) -> BatchPlan[Data]:
        """The plan from the step on that starts after `cursor` samples of all ranks.

        Raises:
            ConfigError: the batch does not divide, or the cursor is not a multiple of it.
        """
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} is not in [0, {world_size})")
        plan = cls(data, data.order.step_of(cursor), accumulation, rank, world_size)
        micro_batch_size(data.order.batch_global, accumulation, world_size)  # a batch that does not divide: refused now
        return plan

    def __iter__(self) -> Iterator[MicroBatch]:
        order = self.data.order
        for step in count(self._first_step):
            for micro in range(self._accumulation):
                yield order.micro_batch(step, micro, self._accumulation, self._rank, self._world_size)

    @property
    def samples(self) -> int:
        """How many each micro-batch has."""
        return micro_batch_size(self.data.order.batch_global, self._accumulation, self._world_size)


# What the randomness of a batch's samples is keyed by.

_ODD, _NOT_NEGATIVE = 0x1E3779B97F4A7C15, (1 << 63) - 1


def sample_keys(sample_ids: Tensor, epochs: Tensor | None) -> Tensor:
    """Keys int64 [b], not negative: a sample's id, and which time it comes round, so that one that comes twice in a
    batch is not noised alike.

    Args:
        sample_ids: int64 [b].
        epochs: int64 [b], how often each sample has come before; None: never.
    """
    return sample_ids if epochs is None else (sample_ids + epochs * _ODD) & _NOT_NEGATIVE


# Stand-ins for the samples that cannot be decoded or read.

STAND_INS = 8  # tried before a sample's neighbours count as bad too


class BadSample(NamedTuple):
    """A sample that another one stood in for, and why."""

    shard: str
    key: str
    reason: str


class BatchWithReplacements(NamedTuple):
    """What came of a micro-batch: the sample that each of its slots comes from; the samples that were bad, stand-ins
    among them; how many slots have stand-ins."""

    places: list[SampleLocation]
    bad: tuple[BadSample, ...]
    stand_ins: int


def take_with_replacements(
    data: SampleSet[Any],
    fetcher: Fetcher,
    batch: MicroBatch,
    found: Sequence[Bytes],
    take: Callable[[int, SampleLocation, bytes], None],
) -> BatchWithReplacements:
    """Let `take` have the bytes of every sample of a micro-batch, or those of one that stands in for it.

    A bad sample's stand-in follows from the seed and the sample's place in the order alone, so every number of ranks
    and workers takes the same one.

    Args:
        data: samples and order.
        fetcher: where a stand-in's bytes come from.
        batch: the micro-batch.
        found: what came of its samples.
        take: told the slot, the sample and its bytes; raises DataError when the sample is bad.

    Raises:
        DataError: a sample is bad, and so is everything that could stand in for it.
    """
    places, bad, stand_ins = [], list[BadSample](), 0
    for slot, first in enumerate(data.places(batch)):
        place, each = first, found[slot]
        for attempt in range(1, STAND_INS + 2):
            try:
                if each.problem is not None:
                    raise DataError(each.problem)
                take(slot, place, each.data)
                places.append(place)
                stand_ins += attempt > 1
                break
            except DataError as error:
                bad.append(_bad(data, place, str(error)))
            place = data.stand_in(batch, slot, attempt)
            each = fetcher.one(place)
        else:
            raise DataError(
                f"{STAND_INS} samples were tried in place of {bad[-1 - STAND_INS].key}, and each was bad; the "
                f"last: {bad[-1].reason}. Run `regen shards verify` on the dataset"
            )
    return BatchWithReplacements(places, tuple(bad), stand_ins)


def _bad(data: SampleSet[Any], place: SampleLocation, reason: str) -> BadSample:
    try:
        key = data.datasets[place.dataset].sample(place.row.row).key
    except DataError:
        key = f"row {place.row.row}"
    return BadSample(place.row.shard, key, reason)
