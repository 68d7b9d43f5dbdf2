"""Config sections of datasets: which are read, how, and the clips that are cut of them. Imports no torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from regen_dist.config.run import (
    SPATIAL_COMPRESSION,
    Fraction,
    HomePath,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ReadableUrl,
    Section,
)


class ReadConfig(Section):
    """Reading of bytes from the store by a decoding process. Nothing here changes the training data."""

    requests: PositiveInt = Field(default=8, description="Requests at once, for each decoding process.")
    ahead_mb: PositiveInt = Field(
        default=64, description="Megabytes fetched ahead of the decoder, held in memory by each decoding process."
    )
    join_kb: NonNegativeInt = Field(
        default=256, description="Samples of a shard that lie at most this many kB apart come by one request."
    )
    stall_s: PositiveFloat = Field(default=10.0, description="Seconds without a byte until a request is tried again.")
    deadline_s: PositiveFloat = Field(
        default=120.0, description="Seconds for all tries of a request together; then the run stops with exit code 3."
    )
    cache: HomePath | None = Field(
        default=None, description="Folder on a local disk that keeps samples from object storage; null: none are kept."
    )
    cache_gb: PositiveFloat = Field(
        default=20.0, description="Size limit of the cache in GB; the least recently used samples are removed first."
    )


class SourceConfig(Section):
    """One dataset of a mixture."""

    url: ReadableUrl = Field(description="Dataset: a folder or a URL (s3://, gs://, az://, https://, hf://).")
    weight: PositiveFloat = Field(default=1.0, description="Share of the samples, relative to the other weights.")


class MixtureConfig(Section):
    """Sources of samples: one dataset or several, and how they are read."""

    url: ReadableUrl | None = Field(
        default=None, description="The one training dataset, a folder or a URL; for several give `mixture` instead."
    )
    mixture: tuple[SourceConfig, ...] = Field(default=(), description="Several training datasets, drawn by weight.")
    validation_url: ReadableUrl | None = Field(
        default=None, description="Dataset of the validation, a folder or a URL; null: the first training dataset."
    )
    image_fraction: Fraction = Field(
        default=0.0, description="Share of the global batches that are images: clips of one frame (paper: both)."
    )
    max_bad_share: Fraction = Field(
        default=0.01, description="Largest share of replacement samples; above it the run stops with exit code 3."
    )
    read: ReadConfig = Field(default=ReadConfig(), description="Reading from the store.")

    @property
    def sources(self) -> tuple[str, ...]:
        """Return the URLs of the training data."""
        return tuple(source.url for source in self.mixture) if self.url is None else (self.url,)

    @property
    def weights(self) -> tuple[float, ...] | None:
        """Return the weights of `sources`; None for a single dataset."""
        return tuple(source.weight for source in self.mixture) if self.url is None else None

    @model_validator(mode="after")
    def _check_sources(self) -> Self:
        if (self.url is None) == (not self.mixture):
            raise ValueError("give either url (one dataset) or mixture (a list of {url, weight})")
        if len(set(self.sources)) < len(self.sources):
            raise ValueError("a dataset stands in the mixture twice; give it once, with the sum of the weights")
        return self


class DataConfig(MixtureConfig):
    """Sources and cropping of clips. Sides in pixels, time in frames."""

    size: tuple[PositiveInt, PositiveInt] = Field(
        default=(64, 64),
        description="Training crop, (height, width) in pixels, multiples of 8; small for CPUs (paper: 192, 320).",
    )
    buckets: tuple[tuple[PositiveInt, PositiveInt], ...] = Field(
        default=(), description="Several crops, (height, width) in pixels; each video goes to the one it fits best."
    )
    validation_size: tuple[PositiveInt, PositiveInt] | None = Field(
        default=None, description="Validation crop, (height, width) in pixels; null: the training crop."
    )
    short_side: PositiveInt | Literal["fit"] | None = Field(
        default=None,
        description="Pixels of the shorter side before the crop; null: as stored; fit: the crop just fits.",
    )
    stride: tuple[PositiveInt, ...] = Field(
        default=(1,), description="Frame strides, one drawn per clip: 2 takes every second."
    )
    flip: bool = Field(default=True, description="Mirror half of the clips, drawn at random.")
    workers: NonNegativeInt = Field(default=1, description="Decoding processes per rank; 0: the rank decodes itself.")
    prefetch: PositiveInt = Field(default=4, description="Batches that each decoding process prepares ahead.")

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Return every crop that training uses, (height, width)."""
        return self.buckets or (self.size,)

    @model_validator(mode="after")
    def _check_sides(self) -> DataConfig:
        named = [("size", self.size), ("validation_size", self.validation_size or self.size)]
        for name, size in [*named, *(("buckets", size) for size in self.buckets)]:
            if any(side % SPATIAL_COMPRESSION for side in size):
                raise ValueError(f"{name} {size} must be multiples of {SPATIAL_COMPRESSION}")
        if isinstance(self.short_side, int):
            for size in self.sizes:
                if self.short_side < min(size):
                    raise ValueError(
                        f"short_side {self.short_side} is smaller than the crop {size}; make it at least {min(size)}"
                    )
        if len(set(self.buckets)) < len(self.buckets):
            raise ValueError(f"buckets {self.buckets}: a size is given twice; keep one")
        return self
