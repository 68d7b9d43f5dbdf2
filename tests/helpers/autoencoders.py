"""Video autoencoders of diffusers with few random weights, saved as their users have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch


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
