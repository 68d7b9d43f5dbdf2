"""Small feature networks in the format of torchvision's VGG."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

# Numbers of the convolutions with their channels: conv, ReLU, pool, conv, ReLU, conv, ReLU.
LAYERS = {0: (3, 8), 3: (8, 16), 5: (16, 16)}
STAGES = (8, 16)


def vgg_tensors(seed: int = 0, *, linear: bool = True) -> dict[str, Tensor]:
    """Weights of a network of two stages, with LPIPS' weights of channels or without."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for number, (channels, wider) in LAYERS.items():
        tensors[f"features.{number}.weight"] = 0.3 * torch.randn(wider, channels, 3, 3, generator=generator)
        tensors[f"features.{number}.bias"] = 0.1 * torch.randn(wider, generator=generator)
    if linear:
        for stage, channels in enumerate(STAGES):
            tensors[f"lin{stage}.model.1.weight"] = torch.rand(1, channels, 1, 1, generator=generator)
    return tensors


def write_vgg(path: Path) -> Path:
    """A file of them."""
    save_file(vgg_tensors() | {"classifier.0.weight": torch.zeros(2, 2)}, path)
    return path
