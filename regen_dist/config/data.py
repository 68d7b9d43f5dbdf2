"""Sections on where training data comes from. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from regen_dist.config.section import SPATIAL_COMPRESSION, Fraction, PositiveFloat, PositiveInt, Section
from regen_dist.config.urls import parse_url


class ReadConfig(Section):
    """How bytes come from the store to a decoding process. Nothing here changes what is trained on."""

    requests: PositiveInt = 8  # at once, for each decoding process
    ahead_mb: PositiveInt = 64  # bytes fetched ahead of the decoder, for each decoding process
    join_kb: Annotated[int, Field(ge=0)] = 256  # neighbours in a shard with a smaller gap come by one request
    stall_s: PositiveFloat = 10.0  # a request that brings nothing for so long is tried again
    deadline_s: PositiveFloat = 120.0  # all tries of a request together; then the run stops and says so
    cache: str | None = None  # folder on a local disk for samples from object storage; None: they are not kept
    cache_gb: PositiveFloat = 20.0


class SourceConfig(Section):
    """One dataset of a mixture. `weight` is its share of the samples, relative to the others' weights."""

    url: str
    weight: PositiveFloat = 1.0

    @field_validator("url")
    @classmethod
    def _url_is_one_we_read(cls, url: str) -> str:
        parse_url(url)
        return url


class MixtureConfig(Section):
    """Where samples come from: one dataset or several, and how they are read."""

    url: str | None = None  # one dataset; or
    mixture: tuple[SourceConfig, ...] = ()  # several, drawn by weight
    validation_url: str | None = None
    image_fraction: Fraction = 0.0  # share of global batches that are images: clips of one frame
    max_bad_share: Fraction = 0.01  # of the samples may be stand-ins for those that cannot be read; then the run stops
    read: ReadConfig = ReadConfig()

    @property
    def sources(self) -> tuple[str, ...]:
        """URLs of the training data."""
        return tuple(source.url for source in self.mixture) if self.url is None else (self.url,)

    @property
    def weights(self) -> tuple[float, ...] | None:
        """The weights of `sources`; None for a single dataset."""
        return tuple(source.weight for source in self.mixture) if self.url is None else None

    @field_validator("url", "validation_url")
    @classmethod
    def _url_is_one_we_read(cls, url: str | None) -> str | None:
        if url is not None:
            parse_url(url)
        return url

    @model_validator(mode="after")
    def _one_source_or_a_mixture(self) -> Self:
        if (self.url is None) == (not self.mixture):
            raise ValueError("give either url (one dataset) or mixture (a list of {url, weight})")
        if len(set(self.sources)) < len(self.sources):
            raise ValueError("a dataset stands in the mixture twice; give it once, with the sum of the weights")
        return self


class DataConfig(MixtureConfig):
    """Where the clips come from and how they are cut. Sides in pixels, time in frames."""

    size: tuple[PositiveInt, PositiveInt] = (64, 64)  # height, width of the training crop
    buckets: tuple[tuple[PositiveInt, PositiveInt], ...] = ()  # several crops: each video goes to the one it fits best
    validation_size: tuple[PositiveInt, PositiveInt] | None = None  # height, width of the validation crop; None: `size`
    # The frame is resized to this before the crop; None keeps the stored size, "fit" makes the crop just fit.
    short_side: PositiveInt | Literal["fit"] | None = None
    stride: tuple[PositiveInt, ...] = (1,)  # frame strides, drawn per clip
    flip: bool = True
    workers: Annotated[int, Field(ge=0)] = 1  # decoding processes per rank; 0 decodes in the rank itself
    prefetch: PositiveInt = 4  # batches that a worker prepares ahead

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Every crop that training uses, (height, width)."""
        return self.buckets or (self.size,)

    @model_validator(mode="after")
    def _sides_fit_the_latent(self) -> DataConfig:
        named = [("size", self.size), ("validation_size", self.validation_size or self.size)]
        for name, size in [*named, *(("buckets", size) for size in self.buckets)]:
            if any(side % SPATIAL_COMPRESSION for side in size):
                raise ValueError(f"{name} {size} must be multiples of {SPATIAL_COMPRESSION}")
        if isinstance(self.short_side, int):
            for size in self.sizes:
                if self.short_side < min(size):
                    raise ValueError(f"short_side {self.short_side} is smaller than the crop {size}")
        if len(set(self.buckets)) < len(self.buckets):
            raise ValueError("a size stands in buckets twice")
        return self
