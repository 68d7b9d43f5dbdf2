"""Config of pre-encoding: a dataset of videos to a cache of latents and text embeddings. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import field_validator, model_validator

from regen_dist.config.files import load_section
from regen_dist.config.run import SPATIAL_COMPRESSION, HomePath, PositiveInt, ReadConfig, Section
from regen_dist.config.t2v import TextConfig
from regen_dist.config.urls import checked_url, expand_home, parse_url


class PreencodeConfig(Section):
    """Config of a latent cache: sources, preprocessing and text encoder."""

    embedder: HomePath  # a run folder, or an exported model
    weights: Literal["ema", "plain"] = "ema"
    data: str  # the dataset of videos: folder or URL
    output: str  # of the cache: folder or URL, empty or begun by the same config
    # (height, width) that videos are resized and cropped to: each goes to the one it fits best. None: the stored sides,
    # cropped to multiples of 16, which a text-to-video model needs.
    buckets: tuple[tuple[PositiveInt, PositiveInt], ...] = ()
    stride: PositiveInt = 1  # take every n-th frame
    max_clips: PositiveInt | None = None  # of a video; the rest is left out
    text: TextConfig | None = TextConfig()  # None: no text embeddings
    batch_clips: PositiveInt = 8  # clips that are encoded at once: changes the speed, and the last bits of the result
    read: ReadConfig = ReadConfig()

    @field_validator("data")
    @classmethod
    def _url_is_one_we_read(cls, url: str) -> str:
        parse_url(url)
        return expand_home(url)

    @field_validator("output")
    @classmethod
    def _url_is_one_we_write(cls, url: str) -> str:
        return expand_home(checked_url(url))

    @model_validator(mode="after")
    def _sides_fit_the_latent(self) -> PreencodeConfig:
        for size in self.buckets:
            if any(side % SPATIAL_COMPRESSION for side in size):
                raise ValueError(f"buckets {size} must be multiples of {SPATIAL_COMPRESSION}")
        if len(set(self.buckets)) < len(self.buckets):
            raise ValueError("a size stands in buckets twice")
        return self


def load_preencode_config(path: str | Path, overrides: tuple[str, ...] = ()) -> PreencodeConfig:
    """Load and validate the config in `path` with the overrides; raise ConfigError with every problem found."""
    return load_section(PreencodeConfig, path, overrides)
