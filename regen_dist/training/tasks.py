"""What a step computes: the loss of a batch, and the validation of a fixed clip.

The task is all that differs between training the embedder, its baseline, and (later) text to video; the loop is the
same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from regen_dist.config.schema import RunConfig
from regen_dist.data.reading.loader import ClipBatch
from regen_dist.diffusion.density import timesteps
from regen_dist.diffusion.noise import Stream, gaussian, uniforms
from regen_dist.diffusion.path import noisy, squared_error_weight, target_of, x0_from
from regen_dist.distributed.base import Engine
from regen_dist.models import Latents, build_model

# A noise prediction has no one-step reconstruction from pure noise: validate as near to it as the division allows.
LATEST_EPS_TIME = 0.98


class Loss(NamedTuple):
    """The loss of a micro-batch (a scalar that carries gradients) and figures to log (plain numbers, averaged over
    micro-batches and ranks)."""

    value: Tensor
    figures: dict[str, Tensor]


class Validation(NamedTuple):
    """Figures of the validation clips, and the clips beside their reconstructions, [B, 3, T, H, W] in [-1, 1]."""

    figures: dict[str, float]
    source: Tensor
    reconstruction: Tensor


class Task(Protocol):
    """What the loop needs of a task."""

    def build(self) -> nn.Module:
        """A fresh model, the same on every rank."""

    def loss(self, engine: Engine, batch: ClipBatch, step: int) -> Loss:
        """The mean loss of a micro-batch. Randomness is a function of (seed, step, sample id)."""

    def validate(self, engine: Engine, batch: ClipBatch) -> Validation:
        """Reconstruct fixed clips in one step. A collective under ZeRO-3: every rank gives the same clips."""


def to_float(video: Tensor, device: torch.device) -> Tensor:
    """uint8 [B, 3, T, H, W] to float32 in [-1, 1] on the device."""
    return video.to(device, non_blocking=True).float().div_(127.5).sub_(1.0)


def psnr_db(a: Tensor, b: Tensor) -> float:
    """PSNR of two videos in [-1, 1], of the mean squared error over everything."""
    return float(10 * torch.log10(4.0 / F.mse_loss(a, b).clamp(min=1e-10)))


class EmbedderTask:
    """REGEN: encoder, conditioning and decoder trained end to end with one diffusion loss (paper, Sec. 3)."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.config, self.device = config, device

    def build(self) -> nn.Module:
        torch.manual_seed(self.config.train.seed)
        model = build_model(self.config.model)
        model.set_activation_checkpointing(self.config.engine.activation_checkpointing)
        return model

    def loss(self, engine: Engine, batch: ClipBatch, step: int) -> Loss:
        x0, ids, settings = to_float(batch.video, self.device), batch.keys.to(self.device), self.config.diffusion
        t = timesteps(settings.density, uniforms(self.config.train.seed, ids, step, Stream.TIMESTEP))
        noise = self._noise(x0, ids, step)
        x_t = noisy(settings.path, x0, noise, t)
        prediction, latents = engine(x0, x_t, t, latent_noise(self.config, x0, ids, step))
        errors = (prediction - target_of(settings.path, settings.target, x0, noise, t)).square()
        weighted = errors * squared_error_weight(settings.path, settings.target, settings.weighting, t)
        return Loss(weighted.mean(), latent_figures(latents, x0.shape[2]))

    @torch.no_grad()
    def validate(self, engine: Engine, batch: ClipBatch) -> Validation:
        x0, ids = to_float(batch.video, self.device), batch.keys.to(self.device)
        settings, noise = self.config.diffusion, self._noise(x0, ids, 0)
        t = torch.full((len(ids),), LATEST_EPS_TIME if settings.target == "eps" else 1.0, device=self.device)
        prediction, latents = engine(x0, noise, t, None)
        return validation(x0, x0_from(settings.path, settings.target, prediction, noise, t), latents)

    def _noise(self, x0: Tensor, ids: Tensor, step: int) -> Tensor:
        times = torch.arange(x0.shape[2], device=x0.device).expand(x0.shape[0], -1)
        return gaussian(self.config.train.seed, ids, times, (x0.shape[3], x0.shape[4]), draw=step)


class BaselineTask(EmbedderTask):
    """The MAGVIT-v2 style baseline: the same encoder and budget, trained on the pixels' squared error."""

    def loss(self, engine: Engine, batch: ClipBatch, step: int) -> Loss:
        x0, ids = to_float(batch.video, self.device), batch.keys.to(self.device)
        reconstruction, latents = engine(x0, latent_noise(self.config, x0, ids, step))
        return Loss(F.mse_loss(reconstruction, x0), latent_figures(latents, x0.shape[2]))

    @torch.no_grad()
    def validate(self, engine: Engine, batch: ClipBatch) -> Validation:
        x0 = to_float(batch.video, self.device)
        reconstruction, latents = engine(x0, None)
        return validation(x0, reconstruction, latents)


def latent_noise(config: RunConfig, x0: Tensor, ids: Tensor, step: int) -> Latents | None:
    """Gaussian noise for the latents, keyed like the pixels' noise; None when the config asks for none."""
    std, channels = config.model.latent.noise_std, config.model.latent.channels
    if std == 0:
        return None
    size = (x0.shape[3] // 8, x0.shape[4] // 8)
    planes = torch.arange(-(-channels // 4), device=x0.device).expand(
        x0.shape[0], -1
    )  # the generator gives four channels a plane

    def draw(stream: Stream) -> Tensor:
        noise = gaussian(config.train.seed, ids, planes, size, channels=4, draw=step, stream=stream)
        return std * noise.transpose(1, 2).flatten(1, 2)[:, :channels]  # [B, Z, h, w]

    return Latents(draw(Stream.LATENT_CONTENT), draw(Stream.LATENT_MOTION))


def latent_figures(latents: Latents, num_frames: int) -> dict[str, Tensor]:
    """The latents' spread over positions: near 0 a latent says nothing, near 1 it uses its whole bound. Images have no
    motion latent to tell of."""
    return {
        f"latent_std_{name}": latent.detach().float().std((0, 2, 3)).mean()
        for name, latent in latents._asdict().items()
        if name != "motion" or num_frames > 1
    }


def validation(source: Tensor, reconstruction: Tensor, latents: Latents) -> Validation:
    """Figures of a one-step reconstruction."""
    reconstruction = reconstruction.clamp(-1, 1)
    figures = {"psnr_db": psnr_db(source, reconstruction)}
    return Validation(
        figures | {name: float(value) for name, value in latent_figures(latents, source.shape[2]).items()},
        source,
        reconstruction,
    )


def build_task(config: RunConfig, device: torch.device) -> Task:
    """The task that the config describes."""
    makers: dict[str, Callable[[RunConfig, torch.device], Any]] = {"regen": EmbedderTask, "magvit2": BaselineTask}
    return makers[config.model.kind](config, device)  # type: ignore[no-any-return]
