"""Runs with the adversarial term, and what their checkpoints hold."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from regen_dist.checkpoint.folder import CheckpointFolder
from regen_dist.checkpoint.manifest import CheckpointManifest

ADVERSARIAL: dict[str, Any] = {
    f"train__losses__adversarial__{key}": value
    for key, value in {"weight": 0.1, "channels": 16, "layers": 1, "lr": 1e-3}.items()
}


def saved_tensors(run: Path, step: int) -> tuple[dict[str, Tensor], CheckpointManifest]:
    """Every tensor of a checkpoint, flat and gathered over the ranks that saved it, by its key; and the manifest."""
    folder = CheckpointFolder(run / "checkpoints")
    manifest = folder.manifest(step)
    shapes = manifest.shapes | manifest.state.get("companion", {}).get("shapes", {})
    reader = folder.reader(replace(manifest, shapes=shapes))
    with safe_open(next(run.glob(f"checkpoints/step-{step:08d}/*.safetensors")), "pt") as shard:  # type: ignore[no-untyped-call]
        keys = list(shard.keys())
    return {key: reader.read(key, 0, prod(shapes[key.split("/", 1)[1]])) for key in keys}, manifest
