"""Networks of others with random weights: diffusers' video autoencoders, and features in torchvision's VGG format."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor


class Kind(NamedTuple):
    """A class of diffusers, how to make it small, and the shape of its latents."""

    name: str
    channels: int
    cell: int
    stride: int
    options: dict[str, Any]


_WIDTHS = (8, 8, 8, 8)
KINDS = {
    "wan": Kind(
        "AutoencoderKLWan", 4, 8, 4,
        {
            "base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "latents_mean": [0.1] * 4,
            "latents_std": [0.5] * 4,
        },
    ),
    "ltx": Kind(
        "AutoencoderKLLTXVideo", 8, 32, 8,
        {
            "latent_channels": 8, "block_out_channels": _WIDTHS, "decoder_block_out_channels": _WIDTHS,
            "layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 5,
        },
    ),
    "cosmos": Kind(
        "AutoencoderKLCosmos", 4, 16, 8,
        {
            "latent_channels": 4, "encoder_block_out_channels": _WIDTHS, "decode_block_out_channels": _WIDTHS,
            "attention_resolutions": (), "resolution": 64, "num_layers": 1, "spatial_compression_ratio": 16,
            "latents_mean": None, "latents_std": None,
        },
    ),
    "hunyuan": Kind(
        "AutoencoderKLHunyuanVideo", 4, 8, 4,
        {"latent_channels": 4, "block_out_channels": _WIDTHS, "layers_per_block": 1, "norm_num_groups": 4},
    ),
    "cogvideox": Kind(
        "AutoencoderKLCogVideoX", 4, 8, 4,
        {"latent_channels": 4, "block_out_channels": _WIDTHS, "layers_per_block": 1, "norm_num_groups": 4},
    ),
}  # fmt: skip


def save_autoencoder(kind: str, folder: Path, seed: int = 0) -> Path:
    """Make one and save it."""
    import diffusers

    torch.manual_seed(seed)
    getattr(diffusers, KINDS[kind].name)(**KINDS[kind].options).save_pretrained(folder)
    return folder


def frozen_model(kind: str, folder: Path, **changes: Any) -> dict[str, Any]:
    """The `model` section of a tiny REGEN on the autoencoder in `folder`; clips of nine frames."""
    one = KINDS[kind]
    return {
        "kind": "regen",
        "temporal_compression": 8,
        "encoder": {"kind": "diffusers", "path": str(folder), "cell": one.cell, "stride": one.stride},
        "latent": {"channels": one.channels},
        "conditioning": {"width": 16, "layers": 2},
        "decoder": {"blocks": 2, "heads": 2, "width": 32, "mlp_ratio": 2.0},
        **changes,
    }


# Small feature networks in the format of torchvision's VGG.


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
