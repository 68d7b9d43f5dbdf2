"""Construction of the model that a config describes."""

from __future__ import annotations

from typing import overload

from regen_dist.config.embedder import ModelConfig
from regen_dist.config.t2v import T2VModelConfig
from regen_dist.models.embedder import Baseline, Regen
from regen_dist.models.t2v import TextToVideo


@overload
def build_model(config: ModelConfig) -> Regen | Baseline: ...


@overload
def build_model(config: T2VModelConfig) -> TextToVideo: ...


def build_model(config: ModelConfig | T2VModelConfig) -> Regen | Baseline | TextToVideo:
    """The embedder or the text-to-video transformer that a config describes, with fresh weights."""
    if isinstance(config, T2VModelConfig):
        return TextToVideo(config)
    return build_embedder(config)


def build_embedder(config: ModelConfig) -> Regen | Baseline:
    """The embedder that a config describes, with fresh weights."""
    return Regen(config) if config.kind == "regen" else Baseline(config)
