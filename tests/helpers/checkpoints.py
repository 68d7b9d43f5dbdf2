"""Looking at a run's checkpoints, and breaking them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from regen_dist.checkpoint.folder import CheckpointFolder, newest_good
from regen_dist.checkpoint.manifest import CheckpointManifest
from regen_dist.checkpoint.shards import shard_name

KINDS = ("master", "ema", "exp_avg", "exp_avg_sq")


def folder_of(run: Path) -> CheckpointFolder:
    """The checkpoints in a run folder."""
    return CheckpointFolder(run / "checkpoints")


def newest(run: Path) -> CheckpointManifest:
    """The checkpoint that a run would go on from; fails when there is none."""
    manifest = newest_good(folder_of(run), checksums=True)
    assert manifest is not None, f"{run} has no checkpoint"
    return manifest


def tensors(run: Path, step: int) -> dict[str, Tensor]:
    """Everything in a checkpoint, gathered: `<kind>/<parameter>` to its whole tensor."""
    folder = folder_of(run)
    manifest = folder.manifest(step)
    reader = folder.reader(manifest)
    return {f"{kind}/{name}": reader.whole(f"{kind}/{name}") for kind in KINDS for name in manifest.shapes}


def write_checkpoint(
    run: Path,
    step: int,
    pieces: Mapping[str, Tensor],
    shapes: dict[str, list[int]],
    *,
    state: dict[str, Any] | None = None,
    metrics: dict[str, float] | None = None,
    rollbacks: Sequence[int] = (),
) -> CheckpointManifest:
    """Commit a checkpoint of one rank, without a training run. Returns its manifest."""
    folder = folder_of(run)
    folder.begin(step)
    facts = folder.write_shard(step, shard_name(0, 1), pieces)
    manifest = CheckpointManifest(
        step=step, samples=4 * step, config_hash="hash", version="0.0.0",
        topology={"world_size": 1, "engine": "plain", "precision": "fp32"}, state=state or {}, metrics=metrics or {},
        rollbacks=list(rollbacks), shapes=shapes,
    ).with_files({shard_name(0, 1): facts})  # fmt: skip
    folder.commit(manifest)
    return manifest
