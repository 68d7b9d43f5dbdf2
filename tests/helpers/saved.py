"""A run folder with checkpoints, without training: written by this process alone, as several ranks would."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regen_dist.checkpoint.folder import CheckpointFolder
from regen_dist.checkpoint.manifest import CheckpointManifest
from regen_dist.checkpoint.shards import shard_name
from regen_dist.config import AnyRunConfig, RunConfig, config_hash, save_config
from regen_dist.distributed.ranks import chunk
from regen_dist.models.embedder import build_model
from tests.helpers.checkpoints import KINDS
from tests.helpers.tiny import tiny_run, wake


def save_checkpoint(
    folder: CheckpointFolder,
    step: int,
    state: dict[str, Tensor],
    *,
    ranks: int = 1,
    digest: str = "hash",
    metrics: dict[str, float] | None = None,
) -> CheckpointManifest:
    """Commit a checkpoint: `<kind>/<parameter>` to whole tensors, cut up as `ranks` ranks hold them."""
    shapes = {key.split("/", 1)[1]: list(tensor.shape) for key, tensor in state.items()}
    manifest = CheckpointManifest(
        step=step,
        samples=4 * step,
        config_hash=digest,
        version="test",
        topology={"world_size": ranks, "engine": "test", "precision": "fp32"},
        state={"num_updates": step, "data_shift": 0, "guards": {}, "data": {"dataset fingerprint": "['f1']"}},
        metrics=metrics or {},
        rollbacks=[],
        shapes=shapes,
    )
    folder.begin(step)
    files = {}
    for rank in range(ranks):
        pieces = {}
        for key, tensor in state.items():
            low, high = chunk(prod(tensor.shape), ranks, rank)
            pieces[key] = tensor.flatten()[low:high]
        files[shard_name(rank, ranks)] = folder.write_shard(step, shard_name(rank, ranks), pieces)
    manifest = manifest.with_files(files)
    folder.commit(manifest)
    return manifest


def small_state(value: float = 1.0) -> dict[str, Tensor]:
    """The state of a model of one parameter, for tests that do not look into it."""
    return {f"{kind}/weight": torch.full((6, 2), value) for kind in KINDS}


def model_state(config: AnyRunConfig, seed: int = 0) -> dict[str, Tensor]:
    """Random weights that do something, averages a little beside them, and moments."""
    torch.manual_seed(seed)
    model = build_model(config.model)
    wake(model, seed)
    masters = {name: param.detach().clone() for name, param in model.named_parameters()}
    state = {f"master/{name}": tensor for name, tensor in masters.items()}
    state |= {f"ema/{name}": tensor + 0.01 for name, tensor in masters.items()}
    return state | {f"{kind}/{name}": torch.rand_like(t) for kind in KINDS[2:] for name, t in masters.items()}


def saved_run(output: Path, url: Path | str = "none", *, step: int = 7, ranks: int = 2, **changes: Any) -> RunConfig:
    """A run of the tiny model with one checkpoint. Returns its config; `config.folder` is the run."""
    config = tiny_run(output, url, **changes)
    save_config(config, config.folder)
    folder = CheckpointFolder(config.checkpoints)
    save_checkpoint(
        folder, step, model_state(config), ranks=ranks, digest=config_hash(config), metrics={"psnr_db": 21.5}
    )
    return config
