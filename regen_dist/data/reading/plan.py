"""Which micro-batches one rank reads."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any, Generic, TypeVar

from regen_dist.config.worldsize import micro_batch_size
from regen_dist.data.order.order import MicroBatch
from regen_dist.data.reading.sample_set import SampleSet
from regen_dist.errors import ConfigError

Data = TypeVar("Data", bound=SampleSet[Any])


class Plan(Generic[Data]):
    """The micro-batches of one rank, in order, without end; any part of them can be begun anew."""

    def __init__(self, data: Data, first_step: int, accumulation: int, rank: int, world_size: int) -> None:
        self.data = data
        self._first_step, self._accumulation = first_step, accumulation
        self._rank, self._world_size = rank, world_size

    @classmethod
    def from_cursor(cls, data: Data, *, accumulation: int, rank: int, world_size: int, cursor: int) -> Plan[Data]:
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
