"""What an exported model says of itself: enough to rebuild it, and where it comes from. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, ValidationError

from regen_dist.config.composing import Composed
from regen_dist.config.problems import describe, message
from regen_dist.config.schema import DiffusionConfig, ModelConfig, RunConfig
from regen_dist.config.section import Section
from regen_dist.config.yamlfile import read_yaml, shown
from regen_dist.errors import CheckpointError, ConfigError

EXPORT_CONFIG_FILE = "config.yaml"


class OriginConfig(Section):
    """The checkpoint that an exported model was taken from."""

    run: str
    step: int
    samples: int
    config_hash: str
    version: str
    saved_at: str
    data: dict[str, str] = Field(default_factory=dict)  # what identified the training data
    metrics: dict[str, float] = Field(default_factory=dict)  # of the newest validation before the checkpoint


class ExportConfig(Section):
    """A model without its run. `sha256` is that of model.safetensors; None is not compared."""

    format: Literal[1] = 1
    model: ModelConfig
    diffusion: DiffusionConfig = DiffusionConfig()
    precision: Literal["bf16", "fp32"] = "bf16"  # of the working weights
    weights: Literal["ema", "plain"] = "ema"
    dtype: Literal["float32", "bfloat16"] = "float32"  # of what is stored
    sha256: str | None = None
    origin: OriginConfig | None = None

    @classmethod
    def of(cls, run: RunConfig, weights: Literal["ema", "plain"] = "ema") -> ExportConfig:
        """What a run's config says of its model alone."""
        return cls(model=run.model, diffusion=run.diffusion, precision=run.engine.precision, weights=weights)

    def to_yaml(self) -> str:
        """The whole of it, every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_export_config(folder: Path) -> ExportConfig:
    """The config of an exported model.

    Raises:
        CheckpointError: there is none, or it does not validate (an export of another version).
    """
    path = folder / EXPORT_CONFIG_FILE
    try:
        values, lines = read_yaml(path)
    except ConfigError as error:
        raise CheckpointError(f"{shown(folder)} is no exported model: {error}") from error
    where = shown(path)
    composed = Composed(values, {key: f"{where}:{line}" for key, line in lines.items()})
    try:
        return ExportConfig.model_validate(values)
    except ValidationError as error:
        problems = describe(error, composed, ExportConfig, where)
        raise CheckpointError(message(f"{shown(folder)} is no exported model of this version", problems)) from error
