"""Batch plan of a rank, RNG keys of samples, and replacement of bad samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any, Generic, NamedTuple, TypeVar

from torch import Tensor

from regen_dist.config.identity import micro_batch_size
from regen_dist.data.loading.datasets import SampleSet
from regen_dist.data.loading.fetch import Fetcher, FetchResult, SampleLocation
from regen_dist.data.order.order import MicroBatch
from regen_dist.errors import ConfigError, DataError

Data = TypeVar("Data", bound=SampleSet[Any])


class BatchPlan(Generic[Data]):
    """Endless sequence of one rank's micro-batches, which can be iterated again from any part."""

    def __init__(self, data: Data, first_step: int, accumulation: int, rank: int, world_size: int) -> None:
        self.data = data
        self._first_step, self._accumulation = first_step, accumulation
        self._rank, self._world_size = rank, world_size

    @classmethod
    def from_cursor(cls, data: Data, *, accumulation: int, rank: int, world_size: int, cursor: int) -> BatchPlan[Data]:
        """Create the plan that starts after `cursor` samples of all ranks.

        Raises:
            ConfigError: the batch does not divide, or the cursor is not a multiple of it.
        """
        if not 0 <= rank < world_size:
            raise ConfigError(
                f"rank {rank} is not in [0, {world_size}); start the ranks with `regen train`, torchrun or Slurm"
            )
        plan = cls(data, data.order.step_of(cursor), accumulation, rank, world_size)
        micro_batch_size(data.order.batch_global, accumulation, world_size)  # raises if the batch does not divide
        return plan

    def __iter__(self) -> Iterator[MicroBatch]:
        return self.part(0, 1)

    def part(self, worker: int, workers: int) -> Iterator[MicroBatch]:
        """Yield every `workers`-th micro-batch from number `worker` on; those between them are not planned."""
        for number in count(worker, workers):
            step, micro = divmod(number, self._accumulation)
            yield self.data.order.micro_batch(
                self._first_step + step, micro, self._accumulation, self._rank, self._world_size
            )

    @property
    def samples(self) -> int:
        return micro_batch_size(self.data.order.batch_global, self._accumulation, self._world_size)


_ODD, _NOT_NEGATIVE = 0x1E3779B97F4A7C15, (1 << 63) - 1


def sample_keys(sample_ids: Tensor, epochs: Tensor | None) -> Tensor:
    """Return non-negative RNG keys int64 [b] of (sample id, epoch), so that repeats of a sample get different noise.

    Args:
        sample_ids: int64 [b].
        epochs: int64 [b], how often each sample has occurred before; None: never.
    """
    return sample_ids if epochs is None else (sample_ids + epochs * _ODD) & _NOT_NEGATIVE


# --- replacement samples for those that cannot be read or decoded ---

MAX_REPLACEMENTS = 8  # attempts before the data counts as bad


class BadSample(NamedTuple):
    """Bad sample that was replaced, with the reason."""

    shard: str
    key: str
    reason: str


class BatchWithReplacements(NamedTuple):
    """Result of reading a micro-batch: the sample in each of its slots; the bad samples, bad replacements included; the
    number of slots with replacements."""

    places: list[SampleLocation]
    bad: tuple[BadSample, ...]
    num_replaced: int


def take_with_replacements(
    data: SampleSet[Any],
    fetcher: Fetcher,
    batch: MicroBatch,
    found: Sequence[FetchResult],
    take: Callable[[int, SampleLocation, bytes], None],
) -> BatchWithReplacements:
    """Pass the bytes of every sample of a micro-batch, or of its replacement, to `take`.

    The replacement of a bad sample depends on the seed and the sample's position in the order only, so it is the same
    for every number of ranks and workers.

    Args:
        data: samples and order.
        fetcher: source of the bytes of replacement samples.
        batch: the micro-batch.
        found: results of fetching its samples.
        take: called with slot, sample and bytes; raises DataError if the sample is bad.

    Raises:
        DataError: a sample and all its possible replacements are bad.
    """
    places, bad, num_replaced = [], list[BadSample](), 0
    for slot, first in enumerate(data.places(batch)):
        place, each = first, found[slot]
        for attempt in range(1, MAX_REPLACEMENTS + 2):
            try:
                if each.problem is not None:
                    raise DataError(each.problem)
                take(slot, place, each.data)
                places.append(place)
                num_replaced += attempt > 1
                break
            except DataError as error:
                bad.append(_bad(data, place, str(error)))
            place = data.replacement(batch, slot, attempt)
            each = fetcher.one(place)
        else:
            raise DataError(
                f"{MAX_REPLACEMENTS} samples were tried in place of {bad[-1 - MAX_REPLACEMENTS].key}, each bad; "
                f"the last: {bad[-1].reason}. Run `regen shards verify` on the dataset"
            )
    return BatchWithReplacements(places, tuple(bad), num_replaced)


def _bad(data: SampleSet[Any], place: SampleLocation, reason: str) -> BadSample:
    try:
        key = data.datasets[place.dataset].sample(place.row.row).key
    except DataError:
        key = f"row {place.row.row}"
    return BadSample(place.row.shard, key, reason)
