"""A tiny video autoencoder of diffusers (Wan's class), trained for some minutes: a frozen encoder to try ours with.

    python -m tools.bench.tiny_autoencoder DATASET --held-out DATASET --out FOLDER --steps 600

Squared error alone; no perceptual and no adversarial loss, and no KL term. FOLDER becomes what `save_pretrained` of
diffusers writes, and `curve.json` in it holds PSNR on the held-out clips over the steps.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from regen_dist.config.files import write_text_atomically
from regen_dist.data.format.catalogue import open_dataset
from regen_dist.data.video.conversion import fit_geometry
from regen_dist.data.video.reader import VideoReader, read_clip
from regen_dist.errors import DataError, needing_extra
from regen_dist.jsontext import json_text
from regen_dist.pixels import to_float

CELL, STRIDE, PATCH = 8, 4, 2  # pixels a side and frames of a latent; pixels a side folded into channels before
CURVE = "curve.json"


def load_clips(url: str, frames: int, side: int, most: int) -> Tensor:
    """Read clips one after the other from the beginning of each video of a dataset, the same number of each and at most
    `most` in all, as uint8 [clips, 3, frames, side, side]."""
    dataset, clips = open_dataset(url), []
    for number in range(min(most, len(dataset))):
        with VideoReader(dataset.read(dataset.row(number))) as reader:
            info = reader.info()
            geometry = fit_geometry(info.height, info.width, (side, side), side)
            for first in range(0, min(info.frames // frames, -(-most // len(dataset))) * frames, frames):
                clips.append(read_clip(reader, range(first, first + frames), geometry))
    if not clips:
        raise DataError(f"{url} has no video of {frames} frames; give another dataset, or fewer --frames")
    return torch.from_numpy(np.stack(clips[:most]))


def build_autoencoder(channels: int, width: int) -> Any:
    """Build Wan's autoencoder with one residual block a level and shortcuts around the levels, as its version 2.2."""
    with needing_extra("a frozen encoder"):
        from diffusers import AutoencoderKLWan
    return AutoencoderKLWan(
        base_dim=width,
        z_dim=channels,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        is_residual=True,
        patch_size=PATCH,
        in_channels=3 * PATCH**2,
        out_channels=3 * PATCH**2,
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
    )


@torch.no_grad()
def psnr_of(model: Any, clips: Tensor) -> float:
    """Compute the PSNR in dB of the model's reconstruction of uint8 clips, of the mean squared error over all."""
    errors = []
    for one in clips.split(8):
        made = model.decode(model.encode(to_float(one)).latent_dist.mode()).sample.clamp(-1, 1)
        errors += (made - to_float(one)).square().mean((1, 2, 3, 4)).tolist()
    return float(10 * np.log10(4 / np.mean(errors)))


def psnr_of_mean_colour(clips: Tensor) -> float:
    """Compute the PSNR in dB of clips [clips, 3, T, H, W] of one colour each, their mean: what learns nothing else."""
    video = to_float(clips)
    return float(10 * np.log10(4 / (video - video.mean((2, 3, 4), keepdim=True)).square().mean().item()))


def train_autoencoder(
    model: Any, clips: Tensor, held_out: Tensor, *, steps: int, batch: int = 8, lr: float = 2e-3, every: int = 50
) -> list[dict[str, float]]:
    """Train a model in place; return `step`, `loss` (mean since the last), held-out `psnr_db` and `seconds`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1, pct_start=0.1)
    draw, began, losses = torch.Generator().manual_seed(0), time.monotonic(), [0.0]
    curve = [{"step": 0, "loss": float("nan"), "psnr_db": psnr_of(model, held_out), "seconds": 0.0}]
    for step in range(1, steps + 1):
        video = to_float(clips[torch.randint(len(clips), (batch,), generator=draw)])
        z = model.encode(video).latent_dist.mode()
        loss = (model.decode(z).sample - video).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % every == 0 or step == steps:
            mean, seconds = float(np.mean(losses[1:])), time.monotonic() - began
            curve.append({"step": step, "loss": mean, "psnr_db": psnr_of(model, held_out), "seconds": seconds})
            print(f"step {step}: loss {mean:.4f}, held out {curve[-1]['psnr_db']:.2f} dB, {seconds:.0f} s", flush=True)
            losses = [0.0]
    return curve


def record_statistics(model: Any, clips: Tensor) -> None:
    """Record the mean and std of each latent channel in the config, as pretrained models have them."""
    with torch.no_grad():
        latents = torch.cat([model.encode(to_float(one)).latent_dist.mode() for one in clips.split(8)])
    spread, mean = torch.std_mean(latents, (0, 2, 3, 4))
    model.register_to_config(latents_mean=mean.tolist(), latents_std=spread.tolist())


def main(
    dataset: Annotated[str, typer.Argument(help="Videos to train on, shards.")],
    held_out: Annotated[str, typer.Option(help="Videos to measure on, shards.")],
    out: Annotated[Path, typer.Option(help="Folder of the autoencoder.")],
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 600,
    side: Annotated[int, typer.Option(min=CELL, help="Height and width in pixels, a multiple of 8.")] = 64,
    frames: Annotated[int, typer.Option(min=1, help="Frames of a clip, 4 n + 1.")] = 9,
    channels: Annotated[int, typer.Option(min=1, help="Channels of the latents.")] = 16,
    width: Annotated[int, typer.Option(min=8, help="Channels of the first level.")] = 16,
    batch: Annotated[int, typer.Option(min=1, help="Clips of a step.")] = 4,
    lr: Annotated[float, typer.Option(min=0, help="Highest learning rate.")] = 2e-3,
    clips: Annotated[int, typer.Option(min=1, help="Most clips to train on.")] = 700,
) -> None:
    """Train a tiny video autoencoder of diffusers on a dataset, and save it."""
    torch.manual_seed(0)
    model = build_autoencoder(channels, width)
    seen, unseen = load_clips(dataset, frames, side, clips), load_clips(held_out, frames, side, 16)
    print(f"the mean colour of each held-out clip: {psnr_of_mean_colour(unseen):.2f} dB", flush=True)
    curve = train_autoencoder(model, seen, unseen, steps=steps, batch=batch, lr=lr)
    record_statistics(model, seen[:64])
    model.save_pretrained(out)
    write_text_atomically(out / CURVE, json_text(curve[1:]))


if __name__ == "__main__":
    typer.run(main)
