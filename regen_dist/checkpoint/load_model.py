"""Loading of trained models, from the newest good checkpoint of a run folder or from an exported model."""

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
_OMITTED = ("samples", "data", "metrics")  # fields of an origin that records of generated files leave out


@dataclass(frozen=True)
class SavedModel(Generic[Config]):
    """Trained model whose weights are not read yet.

    Args:
        path: the run folder, or the exported model.
        config: the export config: model settings and choice of weights.
        run: config of the run; None for an export.
        folder: checkpoints of the run; None for an export.
    """

    path: Path
    config: Config
    run: AnyRunConfig | None = None
    folder: CheckpointFolder | None = None

    @cached_property
    def manifest(self) -> CheckpointManifest | None:
        """Return the newest good checkpoint of a run; None for an export. Raise CheckpointError if there is none."""
        return None if self.folder is None else find_checkpoint(self.folder, checksums=False)

    @property
    def step(self) -> int:
        """Return the optimizer steps of its training; 0 for an export without an origin."""
        if self.manifest is not None:
            return self.manifest.step
        return 0 if self.config.origin is None else self.config.origin.step

    @property
    def name(self) -> str:
        """Return the name of its training run; the folder's name for an export without an origin."""
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
        """Return the hash of the run's config; None for an export without an origin."""
        if self.run is not None:
            return config_hash(self.run)
        return None if self.config.origin is None else self.config.origin.config_hash

    @property
    def what(self) -> str:
        """Return a description of the parameters for messages."""
        if self.folder is None or self.manifest is None:
            return f"the parameters in {self.path}"
        return f"the parameters of step {self.manifest.step} in {self.folder.url}"

    def weights(self, prefix: str = "") -> dict[str, Tensor]:
        """Read the unsharded parameters whose names begin with `prefix`; the others are not loaded.

        Raises:
            CheckpointError: there is no checkpoint, it or the export's file is damaged, or a weight is not finite.
        """
        if self.folder is None or self.manifest is None:
            return read_model(self.path, self.config, prefix)
        return checkpoint_weights(self.folder, self.manifest, self.config.weights, prefix)

    def facts(self) -> dict[str, Any]:
        """Return the origin of the weights for records. It is the same for a run and its unrounded export; an export
        without an origin is identified by its checksum."""
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
        source = {"run": self.name, "sha256": self.config.sha256} if origin is None else origin.model_dump(mode="json")
        facts = {"weights": self.config.weights, "dtype": self.config.dtype} | source
        return {name: value for name, value in facts.items() if name not in _OMITTED}


def find_embedder(path: str | Path, weights: Weights | None = None) -> SavedModel[ExportConfig]:
    """Find a trained embedder in a run folder or an exported model.

    Args:
        path: a run folder, or an export of `regen checkpoint export`.
        weights: the EMA weights (`ema`) or those of the last step (`plain`); None selects the EMA weights of a run,
            and whichever an export holds.

    Raises:
        CheckpointError: an export has other weights than those requested, or is a text-to-video model.
        ConfigError: the folder is neither a run of an embedder nor an export.
    """
    path = Path(path)
    if is_export(path):
        return _exported(path, load_export_config(path), weights)
    config, folder = open_run(path)
    return SavedModel(path, ExportConfig.of(embedder_only(config, str(path)), weights or "ema"), config, folder)


def find_t2v(path: str | Path, weights: Weights | None = None) -> SavedModel[T2VExportConfig]:
    """Find a trained text-to-video model; arguments and errors as for `find_embedder`."""
    path = Path(path)
    if is_export(path):
        return _exported(path, load_t2v_export_config(path), weights)
    config, folder = open_run(path)
    return SavedModel(path, T2VExportConfig.of(t2v_only(config, str(path)), weights or "ema"), config, folder)


def _exported(path: Path, config: Config, weights: Weights | None) -> SavedModel[Config]:
    check_weights(path, config, weights)
    return SavedModel(path, config)
