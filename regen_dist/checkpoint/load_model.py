"""The one door to a trained model: a run folder, whose newest good checkpoint is taken, or an exported model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor

from regen_dist.checkpoint.export import (
    Weights,
    check_weights,
    checkpoint_weights,
    find_checkpoint,
    is_export,
    open_run,
    read_model,
)
from regen_dist.checkpoint.folder import CheckpointFolder
from regen_dist.checkpoint.manifest import CheckpointManifest
from regen_dist.config import AnyRunConfig, config_hash, embedder_only
from regen_dist.config.exported import ExportConfig, T2VExportConfig, load_export_config, load_t2v_export_config
from regen_dist.config.files import t2v_only

Config = TypeVar("Config", ExportConfig, T2VExportConfig)
_NOT_TOLD = ("samples", "data", "metrics")  # of an origin: what a record of generated files has no use for


@dataclass(frozen=True)
class SavedModel(Generic[Config]):
    """A model that was found, of which no weights are read yet.

    Args:
        path: the run folder, or the exported model.
        config: what rebuilds it, and which weights were chosen.
        run: the run's config; None of an export.
        folder: the run's checkpoints; None of an export.
    """

    path: Path
    config: Config
    run: AnyRunConfig | None = None
    folder: CheckpointFolder | None = None

    @cached_property
    def manifest(self) -> CheckpointManifest | None:
        """The newest good checkpoint of a run; None of an export. CheckpointError when there is no good one."""
        return None if self.folder is None else find_checkpoint(self.folder, checksums=False)

    @property
    def step(self) -> int:
        """Optimizer steps of its training; 0 of an export that does not say."""
        if self.manifest is not None:
            return self.manifest.step
        return 0 if self.config.origin is None else self.config.origin.step

    @property
    def name(self) -> str:
        """The run that it was trained by; the folder's name of an export that does not say."""
        if self.run is not None:
            return self.run.name
        return self.path.name if self.config.origin is None else self.config.origin.run

    @property
    def data(self) -> Mapping[str, Any] | None:
        """Facts about the data it was trained on, as its checkpoint or export has them."""
        if self.manifest is not None:
            return self.manifest.state.get("data")
        return None if self.config.origin is None else self.config.origin.data

    @property
    def config_hash(self) -> str | None:
        """Of the run's config; None of an export that does not say."""
        if self.run is not None:
            return config_hash(self.run)
        return None if self.config.origin is None else self.config.origin.config_hash

    @property
    def what(self) -> str:
        """Whose parameters they are, for messages."""
        if self.folder is None or self.manifest is None:
            return f"the parameters in {self.path}"
        return f"the parameters of step {self.manifest.step} in {self.folder.url}"

    def weights(self, prefix: str = "") -> dict[str, Tensor]:
        """Read the parameters whose names begin with `prefix`, whole; of the others no tensor is made.

        Raises:
            CheckpointError: there is no checkpoint, it or the export's file is damaged, or a weight is not finite.
        """
        if self.folder is None or self.manifest is None:
            return read_model(self.path, self.config, prefix)
        return checkpoint_weights(self.folder, self.manifest, self.config.weights, prefix)

    def facts(self) -> dict[str, Any]:
        """Return where the weights come from, for records. A run and what was exported from it, unrounded, say the
        same; an export without an origin is known by its checksum alone."""
        if self.manifest is not None:
            return {
                "run": self.name,
                "step": self.manifest.step,
                "weights": self.config.weights,
                "dtype": "float32",
                "config_hash": self.manifest.config_hash,
                "saved_at": self.manifest.saved_at,
                "version": self.manifest.version,
            }
        origin = self.config.origin
        told = {"run": self.name, "sha256": self.config.sha256} if origin is None else origin.model_dump(mode="json")
        facts = {"weights": self.config.weights, "dtype": self.config.dtype} | told
        return {name: value for name, value in facts.items() if name not in _NOT_TOLD}


def find_embedder(path: str | Path, weights: Weights | None = None) -> SavedModel[ExportConfig]:
    """Find a trained embedder in a run folder or an exported model.

    Args:
        path: a run folder; or what `regen checkpoint export` wrote.
        weights: the averaged ones (`ema`) or those of the last step (`plain`); None takes the averaged ones of a run,
            and of an export those that are in it.

    Raises:
        CheckpointError: an export has other weights than those asked for, or is a text-to-video model.
        ConfigError: the folder is neither a run of an embedder nor an export.
    """
    path = Path(path)
    if is_export(path):
        return _exported(path, load_export_config(path), weights)
    config, folder = open_run(path)
    return SavedModel(path, ExportConfig.of(embedder_only(config, str(path)), weights or "ema"), config, folder)


def find_t2v(path: str | Path, weights: Weights | None = None) -> SavedModel[T2VExportConfig]:
    """Find a trained text-to-video model; as `find_embedder`."""
    path = Path(path)
    if is_export(path):
        return _exported(path, load_t2v_export_config(path), weights)
    config, folder = open_run(path)
    return SavedModel(path, T2VExportConfig.of(t2v_only(config, str(path)), weights or "ema"), config, folder)


def _exported(path: Path, config: Config, weights: Weights | None) -> SavedModel[Config]:
    check_weights(path, config, weights)
    return SavedModel(path, config)
