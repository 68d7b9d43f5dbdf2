"""What an exported model has beside its weights for diffusers, which reads them where they are.

EXPORT/config.json                                     what the class is built from, and which class
EXPORT/diffusion_pytorch_model.safetensors.index.json  that all weights are in model.safetensors
EXPORT/regen_….py                                      the class, with all that it needs of this package
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from regen_dist.checkpoint.export import MODEL_FILE
from regen_dist.config.exported import ExportConfig
from regen_dist.config.files import write_text_atomically
from regen_dist.inference.hub.module import own_module
from regen_dist.inference.statistics import LatentStatistics
from regen_dist.jsontext import json_text

CONFIG_FILE, INDEX_FILE = "config.json", "diffusion_pytorch_model.safetensors.index.json"
_BYTES = {"float32": 4, "bfloat16": 2}


def write_embedder_files(
    folder: Path, config: ExportConfig, shapes: Mapping[str, list[int]], statistics: LatentStatistics | None
) -> None:
    """Make an exported embedder one that `diffusers.AutoModel.from_pretrained` opens.

    Args:
        folder: with its weights.
        config: of it.
        shapes: of its parameters.
        statistics: of its latents, where they were measured.
    """
    name, text = own_module()
    values = {
        "_class_name": "VideoEmbedder",
        "auto_map": {"AutoModel": f"{Path(name).stem}.VideoEmbedder"},
        "model": config.model.model_dump(mode="json"),
        "diffusion": config.diffusion.model_dump(mode="json"),
        "precision": config.precision,
        "noise_std": config.model.latent.noise_std,
        **_scales(statistics),
    }
    write_text_atomically(folder / CONFIG_FILE, json_text(values, indent=2) + "\n")
    write_text_atomically(folder / INDEX_FILE, _index(config.dtype, shapes))
    write_text_atomically(folder / name, text)


def _index(dtype: str, shapes: Mapping[str, list[int]]) -> str:
    size = sum(map(prod, shapes.values())) * _BYTES[dtype]
    content = {"metadata": {"total_size": size}, "weight_map": dict.fromkeys(sorted(shapes), MODEL_FILE)}
    return json_text(content, indent=2) + "\n"


def _scales(statistics: LatentStatistics | None) -> dict[str, Any]:
    """Mean and std of the channels of content and motion, and one factor for all, as diffusers' autoencoders have."""
    spread = None if statistics is None else statistics.clips or statistics.images
    if spread is None:
        return {"latents_mean": None, "latents_std": None, "scaling_factor": 1.0}
    parts = [spread.content, spread.motion or spread.content]
    mean, std = (torch.stack([getattr(part, name) for part in parts]) for name in ("mean", "std"))  # [2, C]
    over_all = (std.square() + (mean - mean.mean()).square()).mean().sqrt()
    return {"latents_mean": mean.tolist(), "latents_std": std.tolist(), "scaling_factor": float(1 / over_all)}
