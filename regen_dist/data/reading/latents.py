"""What text to video trains on: cached latents, sorted into buckets of rows of clips, and their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from regen_dist.config.data import MixtureConfig
from regen_dist.config.identity import latent_identity
from regen_dist.config.t2v import LatentDataConfig
from regen_dist.data.dataset.catalogue import Dataset, open_dataset
from regen_dist.data.dataset.latents import CacheFacts, TextEmbedding, read_null_text
from regen_dist.data.objects.store import limits_of
from regen_dist.data.order.order import Bucket
from regen_dist.data.reading.sample_set import SampleSet
from regen_dist.errors import DataError

_MOST_SIZES = 255  # the pools number them by one byte
_ROWS_AT_ONCE = 1 << 20


class LatentSet(SampleSet[LatentDataConfig]):
    """The samples of a run on latent caches, and their order.

    Each bucket is of one size and so many clips in a row, or of images: the content latent of a video's first clip is
    that of its first frame. An entry is in every bucket of its size that it is long enough for.

    Args:
        config: where the caches are, and how rows are cut.
        batch_global: samples of one optimizer step, over all ranks and micro-batches.
        seed: of the order and of every row's place.

    Attributes:
        facts: of the latent space, which all caches share; what else is in them is the first cache's.
        statistics: of the latents, as JSON, one for each cache in the order of `config.sources`.

    Raises:
        DataError: a dataset cannot be opened, is no cache, or is one of other latents than the first; or no entry fits.
    """

    def __init__(self, config: LatentDataConfig, *, batch_global: int, seed: int) -> None:
        datasets, facts = zip(*(open_latents(url, config) for url in config.sources), strict=True)
        for other in facts[1:]:
            check_same_space(facts[0], other)
        self.facts: CacheFacts = facts[0]
        self.statistics: tuple[Mapping[str, Any], ...] = tuple(each.statistics for each in facts)
        buckets = _buckets(config, sizes_of(datasets), self.facts.num_frames)
        super().__init__(config, datasets, buckets, batch_global=batch_global, seed=seed)

    def null_text(self) -> TextEmbedding | None:
        """The empty caption's embedding; None where the caches have no text. Reads it."""
        return read_null_text(self.datasets[0].store, self.facts)

    def identity(self) -> dict[str, str]:
        """Everything that decides which rows and texts a step sees: while this stays the same, the step alone says
        which. Told in the words of the config."""
        return latent_identity(
            self.config, [each.fingerprint for each in self.datasets], batch_global=self.order.batch_global,
            seed=self.seed,
        )  # fmt: skip

    def _least(self) -> str:
        return f"{min(self.config.clips)} clip(s)"

    def _nothing_fits(self) -> str:
        least, num_frames = min(self.config.clips), self.facts.num_frames
        return (
            f"none of the {len(self)} entries of {', '.join(self.config.sources)} has {least} clip(s) of {num_frames} "
            "frames; lower data.clips, set data.image_fraction to 1, or pre-encode longer videos"
        )


def open_latents(url: str, config: MixtureConfig) -> tuple[Dataset, CacheFacts]:
    """A latent cache and what its manifest says; DataError when it cannot be opened or holds something else."""
    dataset = open_dataset(url, config.read.cache, limits_of(config.read))
    return dataset, CacheFacts.of(dataset.manifest, url)


def check_same_space(first: CacheFacts, other: CacheFacts) -> None:
    """DataError when the latents of two caches must not be mixed."""
    if first.fingerprint != other.fingerprint:
        raise DataError(
            f"{other.url} holds other latents (fingerprint {other.fingerprint}) than {first.url} "
            f"({first.fingerprint}): of other encoder weights, preprocessing, text encoder or version. Pre-encode both "
            "with the same config, or leave one out"
        )


def sizes_of(datasets: Sequence[Dataset]) -> list[tuple[int, int]]:
    """Every (height, width) that there is, in pixels; DataError when they are too many to be buckets."""
    sizes: set[tuple[int, int]] = set()
    for dataset in datasets:
        for start in range(0, len(dataset), _ROWS_AT_ONCE):
            part = dataset.records[start : start + _ROWS_AT_ONCE]
            pairs = np.unique(np.stack([part["height"], part["width"]]), axis=1)
            sizes.update((int(height), int(width)) for height, width in pairs.T)
    if len(sizes) > _MOST_SIZES:
        raise DataError(
            f"the caches hold latents of {len(sizes)} different sizes, at most {_MOST_SIZES} can be sorted into "
            "batches; pre-encode with `buckets`, the sizes that videos are cropped to"
        )
    return sorted(sizes)


def _buckets(config: LatentDataConfig, sizes: Sequence[tuple[int, int]], num_frames: int) -> list[Bucket]:
    """Rows of every number of clips at every size, and images of every size where there are to be some."""
    clips = sorted(config.clips) if config.image_fraction < 1 else []
    rows = [Bucket(height, width, n * num_frames) for height, width in sizes for n in clips]
    return rows + [Bucket(height, width, 1) for height, width in sizes if config.image_fraction > 0]
