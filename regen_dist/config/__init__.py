"""Run config: a typed schema, YAML files composed by inheritance, dotted overrides. Imports no torch."""

from regen_dist.config.embedder import EmbedderConfig
from regen_dist.config.files import (
    AnyRunConfig,
    config_hash,
    embedder_only,
    load_config,
    load_embedder_config,
    load_saved_config,
    save_config,
    to_yaml,
)
from regen_dist.config.t2v import T2VConfig

__all__ = [
    "AnyRunConfig", "EmbedderConfig", "T2VConfig", "config_hash", "embedder_only", "load_config",
    "load_embedder_config", "load_saved_config", "save_config", "to_yaml",
]  # fmt: skip
