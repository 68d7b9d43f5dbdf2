"""The tiny autoencoder of `tools.bench.tiny_autoencoder` learns, and is one that a frozen encoder can be."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from regen_dist.config.embedder import ModelConfig
from regen_dist.models.diffusers_encoder import DiffusersEncoder
from regen_dist.pixels import to_float
from tests.helpers.video import moving_square
from tools.bench.tiny_autoencoder import (
    CELL,
    STRIDE,
    build_autoencoder,
    psnr_of_mean_colour,
    record_statistics,
    train_autoencoder,
)


def test_its_loss_falls(tmp_path: Path) -> None:
    torch.manual_seed(0)
    clips = torch.from_numpy(moving_square(9, 32, 32)).permute(3, 0, 1, 2)[None]
    model = build_autoencoder(channels=4, width=8)
    curve = train_autoencoder(model, clips, clips, steps=12, batch=1, lr=5e-3, every=4)
    assert [point["step"] for point in curve] == [0, 4, 8, 12]
    assert curve[-1]["loss"] < curve[1]["loss"] - 0.01
    assert curve[-1]["psnr_db"] > curve[0]["psnr_db"] + 1
    record_statistics(model, clips)
    model.save_pretrained(tmp_path / "vae")
    settings = {"kind": "diffusers", "path": str(tmp_path / "vae"), "cell": CELL, "stride": STRIDE}
    config = ModelConfig.model_validate({"encoder": settings, "latent": {"channels": 4}})
    latents = DiffusersEncoder(config)(to_float(clips))
    frames = torch.cat([latents.content, latents.motion], 1).unflatten(1, (3, 4))  # [1, n, Z, h, w]
    assert frames.mean((0, 1, 3, 4)).tolist() == pytest.approx([0.0] * 4, abs=1e-4)
    assert frames.std((0, 1, 3, 4)).tolist() == pytest.approx([1.0] * 4, abs=1e-3)


def test_psnr_of_the_mean_colour() -> None:
    halves = torch.zeros(2, 3, 5, 8, 8, dtype=torch.uint8)
    halves[..., 4:] = 255  # each pixel is 1 away from grey in [-1, 1], where the range is 2
    assert psnr_of_mean_colour(halves) == pytest.approx(10 * math.log10(4), abs=0.01)
