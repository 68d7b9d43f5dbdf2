"""Config of an exported model: the settings that rebuild it, and its origin. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from regen_dist.config.embedder import DiffusionConfig, EmbedderConfig, ModelConfig
from regen_dist.config.files import Composed, describe_problem, problem_message
from regen_dist.config.run import SEED_END, PositiveInt, Section
from regen_dist.config.t2v import FlowConfig, T2VConfig, T2VModelConfig
from regen_dist.config.version import fill_later_fields
from regen_dist.config.yaml_files import display, dump_yaml, read_yaml
from regen_dist.errors import CheckpointError, ConfigError

EXPORT_CONFIG_FILE = "config.yaml"


class OriginConfig(Section):
    """Origin of an exported model: the checkpoint that it was taken from."""

    run: str = Field(description="Name of the run.")
    step: int = Field(description="Optimizer step of the checkpoint.")
    samples: int = Field(description="Samples that the run had trained on.")
    config_hash: str = Field(description="SHA-256 of the run's config.")
    version: str = Field(description="Version of the code that trained.")
    saved_at: str = Field(description="Time at which the checkpoint was saved.")
    data: dict[str, str] = Field(default_factory=dict, description="Identity of the training data.")
    metrics: dict[str, float] = Field(default_factory=dict, description="Newest validation before the checkpoint.")


class CommonExportConfig(Section):
    """Export config of every task."""

    format: Literal[1] = Field(default=1, description="Version of this format.")
    precision: Literal["bf16", "fp32"] = Field(default="bf16", description="Working precision of the weights.")
    weights: Literal["ema", "plain"] = Field(
        default="ema", description="Moving average of the weights, or those of the last step."
    )
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="Precision of the stored weights.")
    sha256: str | None = Field(default=None, description="SHA-256 of model.safetensors; null: not compared.")
    origin: OriginConfig | None = Field(default=None, description="Checkpoint that the model was taken from.")

    def to_yaml(self) -> str:
        """Return the complete config as YAML, with every default."""
        return dump_yaml(self.model_dump(mode="json"))


class ExportConfig(CommonExportConfig):
    """Export config of an embedder."""

    model: ModelConfig = Field(description="Encoder, conditioning and decoder.")
    diffusion: DiffusionConfig = Field(default=DiffusionConfig(), description="Diffusion of the decoder.")

    @classmethod
    def of(cls, run: EmbedderConfig, weights: Literal["ema", "plain"] = "ema") -> ExportConfig:
        """Extract the model's part of a run's config."""
        return cls(model=run.model, diffusion=run.diffusion, precision=run.engine.precision, weights=weights)


class T2VExportConfig(CommonExportConfig):
    """Export config of a text-to-video model."""

    model: T2VModelConfig = Field(description="Diffusion transformer on latent frames.")
    diffusion: FlowConfig = Field(default=FlowConfig(), description="Rectified flow with velocity prediction.")
    clips: tuple[PositiveInt, ...] = Field(
        default=(), description="Clips in the rows that it was trained on; empty: on images alone."
    )
    seed: int = Field(default=0, ge=0, lt=SEED_END, description="Seed that its weights were drawn with.")

    @classmethod
    def of(cls, run: T2VConfig, weights: Literal["ema", "plain"] = "ema") -> T2VExportConfig:
        """Extract the model's part of a run's config."""
        return cls(
            model=run.model, diffusion=run.diffusion, precision=run.engine.precision, weights=weights,
            clips=run.data.clips if run.data.image_fraction < 1 else (), seed=run.train.seed,
        )  # fmt: skip


AnyExportConfig = ExportConfig | T2VExportConfig


def load_export_config(folder: Path) -> ExportConfig:
    """Load the config of an exported embedder. Raises like `load_any_export_config`, and CheckpointError for a
    text-to-video model."""
    config = load_any_export_config(folder)
    if not isinstance(config, ExportConfig):
        raise CheckpointError(f"{display(folder)} is a text-to-video model; this needs an embedder")
    return config


def load_t2v_export_config(folder: Path) -> T2VExportConfig:
    """Load the config of an exported text-to-video model. Raises like `load_any_export_config`, and CheckpointError for
    an embedder."""
    config = load_any_export_config(folder)
    if not isinstance(config, T2VExportConfig):
        raise CheckpointError(f"{display(folder)} is an embedder; this needs a text-to-video model")
    return config


def load_any_export_config(folder: Path) -> AnyExportConfig:
    """Load the config of an exported model of any task.

    Raises:
        CheckpointError: there is none, or it does not validate (an export of another version).
    """
    path = folder / EXPORT_CONFIG_FILE
    try:
        values, lines, _ = read_yaml(path)
    except ConfigError as error:
        raise CheckpointError(
            f"{display(folder)} is no exported model: {error}; give a folder that `regen checkpoint export` wrote"
        ) from error
    fill_later_fields(values)
    where, schema = display(path), _schema_of(values)
    composed = Composed(values, {key: f"{where}:{line}" for key, line in lines.items()})
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        problems = describe_problem(error, composed, schema, where)
        raise CheckpointError(
            problem_message(f"{display(folder)} is no exported model of this version", problems)
        ) from error


def _schema_of(values: Mapping[str, Any]) -> type[ExportConfig] | type[T2VExportConfig]:
    """Choose the schema by the model's kind; the schema reports an invalid kind."""
    model = values.get("model")
    is_t2v = isinstance(model, Mapping) and model.get("kind") == "t2v"
    return T2VExportConfig if is_t2v else ExportConfig
