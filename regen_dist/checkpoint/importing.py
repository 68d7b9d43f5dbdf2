"""Begins a run from an exported model: its weights become checkpoint 0, from which any number of ranks train."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regen_dist.checkpoint.export import check_shapes, model_shapes, read_model, stored_shapes
from regen_dist.checkpoint.folder import CheckpointFolder
from regen_dist.checkpoint.manifest import Manifest
from regen_dist.checkpoint.shards import shard_name
from regen_dist.config import AnyRunConfig, config_hash, save_config
from regen_dist.config.exported import AnyExportConfig, load_any_export_config
from regen_dist.config.section import Section
from regen_dist.config.version import code_version
from regen_dist.data.objects.store import limits_of
from regen_dist.distributed.base import WEIGHTS
from regen_dist.distributed.optimizer import OPTIMIZERS
from regen_dist.errors import CheckpointError

# What a model's numbers do not depend on: which kernel computes attention, noise that only training adds, and what
# generation takes by default.
_FREE = {
    "model.decoder.attention.backend",
    "model.attention.backend",
    "model.latent.noise_std",
    "model.linear_start",
    "diffusion.guidance",
}


def import_model(export: Path, config: AnyRunConfig) -> list[str]:
    """Commit checkpoint 0 of the run that `config` describes: masters and EMA are the exported weights, the moments
    are zero, and no data was seen.

    Returns what differs between the export and the config although its parameters fit: those settings change what the
    weights compute.

    Raises:
        CheckpointError: the export is damaged or does not fit the config's model, or the run has checkpoints.
    """
    exported = load_any_export_config(export)
    _check_kind(export, exported, config)
    shapes = model_shapes(config.model)
    check_shapes(stored_shapes(export), shapes, f"the parameters in {export}")
    folder = CheckpointFolder(config.checkpoints, limits_of(config.data.read))
    if steps := folder.steps():
        raise CheckpointError(
            f"{folder.url} holds {len(steps)} checkpoints, the newest of step {steps[-1]}; give the run another name"
        )
    folder.begin(0)
    name = shard_name(0, 1)
    facts = folder.write_shard(0, name, _pieces(read_model(export, exported), OPTIMIZERS[config.optimizer.kind].state))
    folder.commit(_manifest(export, exported, config, shapes).with_files({name: facts}))
    save_config(config, config.folder)
    return differences(exported, config)


def differences(exported: AnyExportConfig, config: AnyRunConfig) -> list[str]:
    """Settings of the model and of its diffusion that are not as they were when the weights were trained, in words."""
    pairs: list[tuple[str, Section, Section]] = [("model", exported.model, config.model)]
    if config.model.kind != "magvit2":
        pairs.append(("diffusion", exported.diffusion, config.diffusion))
    told = []
    for section, before, now in pairs:
        then, here = (dict(_leaves(each.model_dump(mode="json"), section)) for each in (before, now))
        told += [
            f"{name} is {here.get(name)}, the weights were trained with {then.get(name)}"
            for name in {**then, **here}
            if name not in _FREE and then.get(name) != here.get(name)
        ]
    return told


def _check_kind(export: Path, exported: AnyExportConfig, config: AnyRunConfig) -> None:
    """An embedder is no text-to-video model; REGEN and the baseline are told apart by their parameters."""
    if (exported.model.kind == "t2v") != (config.task == "t2v"):
        raise CheckpointError(
            f"{export} holds a model of kind {exported.model.kind}, the config is of task {config.task}; give a config "
            "of the same kind of run"
        )


def _leaves(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}.{name}")
        else:
            yield f"{prefix}.{name}", value


def _pieces(weights: dict[str, Tensor], moments: tuple[str, ...]) -> dict[str, Tensor]:
    """One rank's shard of everything. The zeros take no memory before they are written."""
    flat = {name: tensor.to(torch.float32).reshape(-1) for name, tensor in weights.items()}
    pieces = {f"{kind}/{name}": tensor for kind in WEIGHTS for name, tensor in flat.items()}
    zero = torch.zeros(1)
    return pieces | {f"{kind}/{name}": zero.expand(len(tensor)) for kind in moments for name, tensor in flat.items()}


def _manifest(export: Path, exported: AnyExportConfig, config: AnyRunConfig, shapes: dict[str, list[int]]) -> Manifest:
    origin = None if exported.origin is None else exported.origin.model_dump(mode="json")
    imported = {"from": str(export), "weights": exported.weights, "origin": origin}
    return Manifest(
        step=0,
        samples=0,
        config_hash=config_hash(config),
        version=code_version(),
        topology={"world_size": 1, "engine": "import", "precision": config.engine.precision},
        state={"num_updates": 0, "data_shift": 0, "guards": {}, "data": None, "imported": imported},
        metrics={},
        rollbacks=[],
        shapes=shapes,
    )
