"""Samples of one or several datasets, sorted into buckets, and the order in which they come."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Generic, TypeVar

from regen_dist.config.data import MixtureConfig
from regen_dist.data.dataset.catalogue import Dataset, cache_folder
from regen_dist.data.order.order import Bucket, MicroBatch, Order, Stream
from regen_dist.data.reading.fetching import Place
from regen_dist.data.reading.pools import PoolRows, Pools, make_pools
from regen_dist.errors import DataError

Config = TypeVar("Config", bound=MixtureConfig)


class SampleSet(ABC, Generic[Config]):
    """What a set of videos and one of latents have in common. Cheap to send to another process.

    Args:
        config: where the data is.
        datasets: opened, in the order of `config.sources`.
        buckets: what samples are sorted into, distinct; those of one frame are for images.
        batch_global: samples of one optimizer step, over all ranks and micro-batches.
        seed: of the order and of every sample's draws.

    Raises:
        ConfigError: weights or image_fraction do not fit the data.
        DataError: no sample fits, or a catalogue cannot be written.
    """

    def __init__(
        self, config: Config, datasets: Sequence[Dataset], buckets: Sequence[Bucket], *, batch_global: int, seed: int
    ) -> None:
        self.config, self.seed = config, seed
        self.datasets, self.buckets = tuple(datasets), tuple(buckets)
        folder = cache_folder(config.read.cache) / "catalogues"
        self._pools: tuple[Pools, ...] = tuple(make_pools(each, self.buckets, folder) for each in self.datasets)
        if config.image_fraction < 1 and not self._num_long_enough:
            raise DataError(self._nothing_fits())
        streams = [Stream(bucket, self._sizes(number)) for number, bucket in enumerate(self.buckets)]
        self.order = Order(tuple(streams), batch_global, seed, config.weights, config.image_fraction)

    def __getstate__(self) -> dict[str, object]:
        """Without what is mapped: the other process maps it again."""
        return {name: value for name, value in vars(self).items() if name != "_rows"}

    def __len__(self) -> int:
        return sum(len(dataset) for dataset in self.datasets)

    def places(self, batch: MicroBatch) -> list[Place]:
        """The samples of a micro-batch, in order."""
        return [
            self._place(batch, int(dataset), int(row)) for dataset, row in zip(batch.datasets, batch.rows, strict=True)
        ]

    def stand_in(self, batch: MicroBatch, slot: int, attempt: int) -> Place:
        """Who stands in for a bad sample of a micro-batch: of the same dataset and bucket, by the seed alone."""
        dataset, epoch, row = int(batch.datasets[slot]), int(batch.epochs[slot]), int(batch.rows[slot])
        return self._place(batch, dataset, self.order.stand_in(batch.stream, dataset, epoch, row, attempt))

    @abstractmethod
    def identity(self) -> dict[str, str]:
        """Everything that decides what a step sees: while this stays the same, the step alone says it. Told in the
        words of the config."""

    def summary(self) -> str:
        """One line for the log: how many samples there are, and how many no bucket of clips can use."""
        text = f"data: {len(self)} samples in {len(self.datasets)} dataset(s), {len(self.buckets)} bucket(s)"
        short = len(self) - self._num_long_enough
        if short and self.config.image_fraction < 1:
            text += f"; {short} have fewer than {self._least()}" + (
                " and are used as images only" if self.config.image_fraction else " and are left out"
            )
        return text

    @abstractmethod
    def _least(self) -> str:
        """How long a sample must be to give a clip, in words."""

    @abstractmethod
    def _nothing_fits(self) -> str:
        """What to say when no sample is so long."""

    def _place(self, batch: MicroBatch, dataset: int, row: int) -> Place:
        return Place(dataset, self.datasets[dataset].row(self._rows[dataset].row(batch.stream, row)))

    @cached_property
    def _rows(self) -> list[PoolRows]:
        return [PoolRows(pools) for pools in self._pools]

    def _sizes(self, bucket: int) -> tuple[int, ...]:
        return tuple(pools.size(bucket) for pools in self._pools)

    @property
    def _num_long_enough(self) -> int:
        """Samples that the buckets of the shortest clips hold."""
        lengths = sorted(bucket.frames for bucket in self.buckets if not bucket.is_image)
        return sum(sum(self._sizes(n)) for n, bucket in enumerate(self.buckets) if bucket.frames in lengths[:1])
