"""What a run trains on: its datasets, their samples sorted into buckets, and the order in which they come."""

from __future__ import annotations

from functools import cached_property

from regen_dist.config.identity import order_identity
from regen_dist.config.schema import DataConfig
from regen_dist.data.dataset.catalogue import Dataset, cache_folder, open_dataset
from regen_dist.data.order.order import Bucket, MicroBatch, Order, Stream
from regen_dist.data.reading.fetching import Place, limits_of
from regen_dist.data.reading.pools import PoolRows, Pools, make_pools
from regen_dist.errors import DataError


class TrainingSet:
    """The samples of a run and their order. Cheap to send to another process.

    Args:
        config: where the data is and how clips are cut.
        num_frames: frames of a clip (k + 1).
        batch_global: samples of one optimizer step, over all ranks and micro-batches.
        seed: of the order and of every clip's place.

    Raises:
        DataError: a dataset cannot be opened, or no sample fits.
    """

    def __init__(self, config: DataConfig, *, num_frames: int, batch_global: int, seed: int) -> None:
        self.config, self.seed, self._num_frames = config, seed, num_frames
        self.datasets: tuple[Dataset, ...] = tuple(
            open_dataset(url, config.read.cache, limits_of(config.read)) for url in config.sources
        )
        self.buckets = _buckets(config, num_frames)
        folder = cache_folder(config.read.cache) / "catalogues"
        self._pools: tuple[Pools, ...] = tuple(make_pools(each, self.buckets, folder) for each in self.datasets)
        if config.image_fraction < 1 and not any(self._sizes_of_clips()):
            raise DataError(
                f"none of the {sum(map(len, self.datasets))} samples of {', '.join(config.sources)} has the "
                f"{num_frames} frames of a clip; build shards with --min-frames {num_frames}, or train a model of "
                "smaller temporal compression"
            )
        streams = [Stream(bucket, self._sizes(number)) for number, bucket in enumerate(self.buckets)]
        self.order = Order(tuple(streams), batch_global, seed, config.weights, config.image_fraction)

    def __getstate__(self) -> dict[str, object]:
        """Without what is mapped: the other process maps it again."""
        return {name: value for name, value in vars(self).items() if name != "_rows"}

    def places(self, batch: MicroBatch) -> list[Place]:
        """The samples of a micro-batch, in order."""
        return [
            self._place(batch, int(dataset), int(row)) for dataset, row in zip(batch.datasets, batch.rows, strict=True)
        ]

    def stand_in(self, batch: MicroBatch, slot: int, attempt: int) -> Place:
        """Who stands in for a bad sample of a micro-batch: of the same dataset and bucket, by the seed alone."""
        dataset, epoch, row = int(batch.datasets[slot]), int(batch.epochs[slot]), int(batch.rows[slot])
        return self._place(batch, dataset, self.order.stand_in(batch.stream, dataset, epoch, row, attempt))

    def identity(self) -> dict[str, str]:
        """Everything that decides which clips a step sees: while this stays the same, the step alone says which. Told
        in the words of the config."""
        return order_identity(
            self.config, [each.fingerprint for each in self.datasets], num_frames=self._num_frames,
            batch_global=self.order.batch_global, seed=self.seed,
        )  # fmt: skip

    def summary(self) -> str:
        """One line for the log: how many samples there are, and how many no bucket can use."""
        total = sum(len(dataset) for dataset in self.datasets)
        used = sum(self._sizes_of_clips())
        text = f"data: {total} samples in {len(self.datasets)} dataset(s), {len(self.buckets)} bucket(s)"
        if used < total and self.config.image_fraction < 1:
            text += f"; {total - used} have fewer than {self._num_frames} frames" + (
                " and are used as images only" if self.config.image_fraction else " and are left out"
            )
        return text

    def _place(self, batch: MicroBatch, dataset: int, row: int) -> Place:
        return Place(dataset, self.datasets[dataset].row(self._rows[dataset].row(batch.stream, row)))

    @cached_property
    def _rows(self) -> list[PoolRows]:
        return [PoolRows(pools) for pools in self._pools]

    def _sizes(self, bucket: int) -> tuple[int, ...]:
        return tuple(pools.size(bucket) for pools in self._pools)

    def _sizes_of_clips(self) -> list[int]:
        return [sum(self._sizes(n)) for n, bucket in enumerate(self.buckets) if bucket.frames == self._num_frames]


def _buckets(config: DataConfig, num_frames: int) -> tuple[Bucket, ...]:
    """Clips of every size, and images of every size where there are to be some."""
    clips = [Bucket(height, width, num_frames) for height, width in config.sizes if config.image_fraction < 1]
    images = [Bucket(height, width, 1) for height, width in config.sizes if config.image_fraction > 0]
    return tuple(dict.fromkeys([*clips, *images]))
