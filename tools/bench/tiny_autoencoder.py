"""A tiny video autoencoder of diffusers (LTX's class), trained for some minutes: a frozen encoder to try ours with.

    python -m tools.bench.tiny_autoencoder DATASET --held-out DATASET --out FOLDER --steps 400

Squared error, and a weak pull of the latents towards 0; no perceptual and no adversarial loss. FOLDER becomes what
`save_pretrained` of diffusers writes, and `curve.json` beside it holds PSNR on the held-out clips over the steps.
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

CELL, STRIDE = 32, 8  # pixels a side and frames of a latent, by the class
CURVE = "curve.json"
LATENT_PULL = 1e-3  # weight of the latents' mean square beside the squared error


def load_clips(url: str, frames: int, side: int, most: int) -> Tensor:
    """Read the first frames of a dataset's first videos, at most `most`, as uint8 [clips, 3, frames, side, side]."""
    dataset, clips = open_dataset(url), []
    for number in range(min(most, len(dataset))):
        with VideoReader(dataset.read(dataset.row(number))) as reader:
            info = reader.info()
            if info.frames >= frames:
                clips.append(
                    read_clip(reader, range(frames), fit_geometry(info.height, info.width, (side, side), side))
                )
    if not clips:
        raise DataError(f"{url} has no video of {frames} frames; give another dataset, or fewer --frames")
    return torch.from_numpy(np.stack(clips))


def build_autoencoder(channels: int, width: int) -> Any:
    """Build LTX's autoencoder with one layer a block."""
    with needing_extra("a frozen encoder"):
        from diffusers import AutoencoderKLLTXVideo
    widths = (width, 2 * width, 2 * width, 2 * width)
    return AutoencoderKLLTXVideo(
        latent_channels=channels,
        block_out_channels=widths,
        decoder_block_out_channels=widths,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
    )


def as_input(clips: Tensor) -> Tensor:
    """Convert uint8 clips to float32 in [-1, 1]."""
    return to_float(clips)


@torch.no_grad()
def psnr_of(model: Any, clips: Tensor) -> float:
    """Compute the PSNR in dB of the model's reconstruction of uint8 clips, of the mean squared error over all."""
    errors = []
    for one in clips.split(8):
        made = model.decode(model.encode(as_input(one)).latent_dist.mode()).sample.clamp(-1, 1)
        errors += (made - as_input(one)).square().mean((1, 2, 3, 4)).tolist()
    return float(10 * np.log10(4 / np.mean(errors)))


def train_autoencoder(
    model: Any, clips: Tensor, held_out: Tensor, *, steps: int, batch: int = 8, lr: float = 2e-3, every: int = 50
) -> list[dict[str, float]]:
    """Train a model in place; return `step`, `loss` (mean since the last), held-out `psnr_db` and `seconds`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1, pct_start=0.1)
    draw, began, losses = torch.Generator().manual_seed(0), time.monotonic(), [0.0]
    curve = [{"step": 0, "loss": float("nan"), "psnr_db": psnr_of(model, held_out), "seconds": 0.0}]
    for step in range(1, steps + 1):
        video = as_input(clips[torch.randint(len(clips), (batch,), generator=draw)])
        z = model.encode(video).latent_dist.mode()
        loss = (model.decode(z).sample - video).square().mean() + LATENT_PULL * z.square().mean()
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


def main(
    dataset: Annotated[str, typer.Argument(help="Videos to train on, shards.")],
    held_out: Annotated[str, typer.Option(help="Videos to measure on, shards.")],
    out: Annotated[Path, typer.Option(help="Folder of the autoencoder.")],
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 400,
    side: Annotated[int, typer.Option(min=CELL, help="Height and width in pixels, a multiple of 32.")] = 32,
    frames: Annotated[int, typer.Option(min=1, help="Frames of a clip, 8 n + 1.")] = 9,
    channels: Annotated[int, typer.Option(min=1, help="Channels of the latents.")] = 64,
    width: Annotated[int, typer.Option(min=8, help="Channels of the first block.")] = 32,
    batch: Annotated[int, typer.Option(min=1, help="Clips of a step.")] = 8,
    clips: Annotated[int, typer.Option(min=1, help="Most clips to train on.")] = 1000,
) -> None:
    """Train a tiny video autoencoder of diffusers on a dataset, and save it."""
    torch.manual_seed(0)
    model = build_autoencoder(channels, width)
    seen, unseen = load_clips(dataset, frames, side, clips), load_clips(held_out, frames, side, 64)
    curve = train_autoencoder(model, seen, unseen, steps=steps, batch=batch)
    with torch.no_grad():
        spread = model.encode(as_input(seen[:64])).latent_dist.mode().std().item()
    model.register_to_config(scaling_factor=1 / spread)  # so that normalised latents have a std of 1
    model.save_pretrained(out)
    write_text_atomically(out / CURVE, json_text(curve[1:]))


if __name__ == "__main__":
    typer.run(main)
