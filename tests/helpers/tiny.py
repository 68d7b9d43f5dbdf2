"""The smallest models and runs that still have every part, with and without the adversarial term."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from regen_dist.checkpoint.folder import CheckpointFolder
from regen_dist.checkpoint.manifest import CheckpointManifest
from regen_dist.config.embedder import EmbedderConfig, ModelConfig
from regen_dist.config.t2v import T2VConfig, T2VModelConfig
from regen_dist.data.build.build import build_shards
from regen_dist.data.build.segments import BuildOptions
from tests.helpers.video import moving_square, write_video

SIDE = 32


def tiny_model(temporal_compression: int = 4, **changes: Any) -> ModelConfig:
    """A model config of about 100,000 parameters. Changes are named by dotted keys with `__` for the dots."""
    stages = [{"channels": min(16 + 8 * i, 32), "temporal": 2} for i in range(temporal_compression.bit_length() - 1)]
    stages[1]["spatial"] = 2
    values: dict[str, Any] = {
        "kind": "regen",
        "temporal_compression": temporal_compression,
        "encoder": {"stem_patch": 4, "stages": stages},
        "conditioning": {"width": 16, "layers": 2},
        "decoder": {"blocks": 2, "heads": 2, "width": 32, "mlp_ratio": 2.0},
    }
    return ModelConfig.model_validate(_changed(values, changes))


def tiny_t2v_model(**changes: Any) -> T2VModelConfig:
    """A text-to-video model of about 30,000 parameters."""
    values: dict[str, Any] = {
        "blocks": 2,
        "heads": 2,
        "width": 32,
        "mlp_ratio": 2.0,
        "text_width": 12,
        "attention": {"backend": "eager"},
    }
    return T2VModelConfig.model_validate(_changed(values, changes))


def tiny_run(output: Path | str = "runs", url: Path | str = "none", **changes: Any) -> EmbedderConfig:
    """A run config around `tiny_model`: one process, float32, four clips a step, every step logged."""
    values: dict[str, Any] = {
        "name": "tiny",
        "output": str(output),
        "model": tiny_model().model_dump(mode="json"),
        "data": {"url": str(url), "size": [SIDE, SIDE], "workers": 0},
        "optimizer": {"lr": 1e-3, "warmup_steps": 2},
        "engine": {"kind": "plain", "precision": "fp32"},
        "train": {
            "steps": 8,
            "batch_global": 4,
            "seed": 3,
            "ema_decay": 0.9,
            "log_every": 1,
            "validate_every": 1000,
            "peak_tflops": 0.1,
        },
        "checkpoint": {"every": 1000},
    }
    return EmbedderConfig.model_validate(_changed(values, changes))


def tiny_t2v(output: Path | str = "runs", url: Path | str = "none", **changes: Any) -> T2VConfig:
    """A text-to-video config around `tiny_t2v_model`, with texts as wide as those of `write_cache`: one process,
    float32, four rows a step, every step logged."""
    values: dict[str, Any] = {
        "name": "tiny_t2v",
        "output": str(output),
        "model": tiny_t2v_model(text_width=16).model_dump(mode="json"),
        "diffusion": {"steps": 4, "guidance": 2.0, "shift_tokens": 8},
        "data": {"url": str(url), "clips": [1]},
        "optimizer": {"lr": 1e-3, "warmup_steps": 2},
        "engine": {"kind": "plain", "precision": "fp32"},
        "train": {
            "steps": 8,
            "batch_global": 4,
            "seed": 3,
            "ema_decay": 0.9,
            "log_every": 1,
            "validate_every": 1000,
            "peak_tflops": 0.1,
        },
        "checkpoint": {"every": 1000},
    }
    return T2VConfig.model_validate(_changed(values, changes))


def _changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    for name, value in changes.items():
        *path, last = name.split("__")
        place = values
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return values


def wake(model: nn.Module, seed: int = 0) -> None:
    """Open what starts closed: every parameter that is all zeros gets small random values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def clips(count: int = 2, num_frames: int = 5, height: int = SIDE, width: int = SIDE, seed: int = 0) -> torch.Tensor:
    """Random smooth-ish clips [B, 3, T, H, W] in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, num_frames, height, width, generator=generator) * 2 - 1


def tiny_dataset(folder: Path) -> Path:
    """Eight samples of 24 frames, 48 pixels high, cut from two real (encoded) videos."""
    for seed in (1, 2):
        write_video(folder / "videos" / f"{seed}.mp4", moving_square(96, 48, 64, seed=seed))
    options = BuildOptions(segment_seconds=1.0, short_side=48, crf=20, samples_per_shard=4, min_frames=20)
    build_shards([folder / "videos"], folder / "shards", options, workers=0)
    return folder / "shards"


# Presets as tests want them: independent of how `nano` is tuned.


STAGES_AT_8 = "[{channels: 64, temporal: 2}, {channels: 96, spatial: 2, temporal: 2}, {channels: 128, temporal: 2}]"
NANO_AT_8 = [  # overrides that make configs/embedder/nano*.yaml a k = 8 model with full attention
    "model.temporal_compression=8",
    f"model.encoder.stages={STAGES_AT_8}",
    "model.decoder.attention={backend: sdpa, pattern: full}",
]


# Runs with the adversarial term, and what their checkpoints hold.


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
