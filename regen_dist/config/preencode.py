"""Config of pre-encoding: a dataset of videos to a cache of latents and text embeddings. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from regen_dist.config.datasets import ReadConfig
from regen_dist.config.files import load_section
from regen_dist.config.run import HomePath, PositiveInt, ReadableUrl, Section, WritableUrl
from regen_dist.config.t2v import SIDE_MULTIPLE, TextConfig


class PreencodeConfig(Section):
    """Config of a latent cache: sources, preprocessing and text encoder."""

    embedder: HomePath = Field(description="Run folder or exported model that encodes.")
    weights: Literal["ema", "plain"] = Field(
        default="ema", description="Weights of a run: their moving average, or those of the last step."
    )
    data: ReadableUrl = Field(description="Dataset of videos: a folder or a URL.")
    output: WritableUrl = Field(description="Folder or URL of the cache; empty, or begun by the same config.")
    buckets: tuple[tuple[PositiveInt, PositiveInt], ...] = Field(
        default=(),
        description="Sizes (height, width) in pixels, each video goes to the one it fits best; empty: stored sides, "
        "cut to multiples of 16.",
    )
    stride: PositiveInt = Field(default=1, description="Frame stride: every n-th frame is encoded.")
    max_clips: PositiveInt | None = Field(
        default=None, description="Clips of a video at most, the rest is left out; null: all."
    )
    text: TextConfig | None = Field(
        default=TextConfig(), description="Text encoder of the captions; null: no text embeddings."
    )
    batch_clips: PositiveInt = Field(
        default=8,
        description="Clips that are encoded at once: changes speed, memory, and the last bits of the latents.",
    )
    read: ReadConfig = Field(default=ReadConfig(), description="Reading from the store.")

    @model_validator(mode="after")
    def _check_sides(self) -> PreencodeConfig:
        for size in self.buckets:
            if any(side % SIDE_MULTIPLE for side in size):
                raise ValueError(f"buckets {size} must be multiples of {SIDE_MULTIPLE}, as text to video takes them")
        if len(set(self.buckets)) < len(self.buckets):
            raise ValueError(f"buckets {self.buckets}: a size is given twice; keep one")
        return self


def load_preencode_config(path: str | Path, overrides: tuple[str, ...] = ()) -> PreencodeConfig:
    """Load and validate the config in `path` with the overrides; raise ConfigError with every problem found."""
    return load_section(PreencodeConfig, path, overrides)
