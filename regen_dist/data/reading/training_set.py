"""What an embedder trains on: videos, sorted into buckets, and the order in which they come."""

from __future__ import annotations

from regen_dist.config.identity import order_identity
from regen_dist.config.schema import DataConfig
from regen_dist.data.dataset.catalogue import Dataset, open_dataset
from regen_dist.data.dataset.manifest import only_videos
from regen_dist.data.objects.store import limits_of
from regen_dist.data.order.order import Bucket
from regen_dist.data.reading.sample_set import SampleSet


class TrainingSet(SampleSet[DataConfig]):
    """The samples of a run and their order. Cheap to send to another process.

    Args:
        config: where the data is and how clips are cut.
        num_frames: frames of a clip (k + 1).
        batch_global: samples of one optimizer step, over all ranks and micro-batches.
        seed: of the order and of every clip's place.

    Raises:
        DataError: a dataset cannot be opened or holds no videos, or no sample fits.
    """

    def __init__(self, config: DataConfig, *, num_frames: int, batch_global: int, seed: int) -> None:
        self._num_frames = num_frames
        datasets = [open_videos(url, config) for url in config.sources]
        super().__init__(config, datasets, _buckets(config, num_frames), batch_global=batch_global, seed=seed)

    def identity(self) -> dict[str, str]:
        """Everything that decides which clips a step sees: while this stays the same, the step alone says which. Told
        in the words of the config."""
        return order_identity(
            self.config, [each.fingerprint for each in self.datasets], num_frames=self._num_frames,
            batch_global=self.order.batch_global, seed=self.seed,
        )  # fmt: skip

    def _least(self) -> str:
        return f"{self._num_frames} frames"

    def _nothing_fits(self) -> str:
        return (
            f"none of the {len(self)} samples of {', '.join(self.config.sources)} has the {self._num_frames} frames of "
            f"a clip; build shards with --min-frames {self._num_frames}, or train a model of smaller temporal "
            "compression"
        )


def open_videos(url: str, config: DataConfig) -> Dataset:
    """A dataset of videos; DataError when it cannot be opened or holds something else."""
    dataset = open_dataset(url, config.read.cache, limits_of(config.read))
    only_videos(dataset.manifest, url)
    return dataset


def _buckets(config: DataConfig, num_frames: int) -> tuple[Bucket, ...]:
    """Clips of every size, and images of every size where there are to be some."""
    clips = [Bucket(height, width, num_frames) for height, width in config.sizes if config.image_fraction < 1]
    images = [Bucket(height, width, 1) for height, width in config.sizes if config.image_fraction > 0]
    return tuple(dict.fromkeys([*clips, *images]))
