"""The embedders' tasks: REGEN, trained end to end with one diffusion loss, and the baseline.

Legend: B clips, T frames, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import cached_property

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from regen_dist import pixels
from regen_dist.config.embedder import EmbedderConfig, ModelConfig
from regen_dist.data.loading.clip_loader import ClipBatch, clip_batches
from regen_dist.data.loading.datasets import TrainingSet
from regen_dist.data.loading.validation import validation_clip
from regen_dist.diffusion.noise import NoiseStream, gaussian, latent_gaussian, uniforms
from regen_dist.diffusion.path import noisy, signal_share, squared_error_weight, target_of, timesteps, x0_from
from regen_dist.distributed.engine import Engine
from regen_dist.distributed.ranks import Ranks
from regen_dist.models.diffusers_encoder import ENCODER_FACT, DiffusersEncoder
from regen_dist.models.embedder import Baseline, Regen, build_model
from regen_dist.models.encoder import Latents
from regen_dist.models.flops import training_flops_per_clip
from regen_dist.training.linear_start import LINEAR_CODES, first_cells, fit_linear_code
from regen_dist.training.losses import ExtraLosses
from regen_dist.training.task import Loss, Validation, on_device

# A noise prediction has no one-step reconstruction from pure noise: validate as close to it as the division allows.
LATEST_EPS_TIME = 0.98


def to_float(video: Tensor, device: torch.device) -> Tensor:
    """uint8 [B, 3, T, H, W] to float32 in [-1, 1] on the device."""
    return pixels.to_float(video.to(device, non_blocking=True))


def psnr_db(a: Tensor, b: Tensor) -> float:
    """PSNR of two videos in [-1, 1], of the mean squared error over everything."""
    return float(10 * torch.log10(4.0 / F.mse_loss(a, b).clamp(min=1e-10)))


class EmbedderTask:
    """REGEN: encoder, conditioning and decoder trained end to end with one diffusion loss (paper, Sec. 3)."""

    def __init__(self, config: EmbedderConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.extra_losses = ExtraLosses(config, device)

    @cached_property
    def data(self) -> TrainingSet:
        config = self.config
        return TrainingSet(
            config.data, num_frames=config.model.num_frames, batch_global=config.train.batch_global,
            seed=config.train.seed, also=frozen_encoder(config.model),
        )  # fmt: skip

    @cached_property
    def _validation_clips(self) -> ClipBatch:
        return validation_clip(self.config.data, num_frames=self.config.model.num_frames)

    def batches(self, ranks: Ranks, cursor: int) -> Generator[ClipBatch]:
        accumulation = self.config.train.accumulation
        return clip_batches(
            self.data, accumulation=accumulation, rank=ranks.rank, world_size=ranks.world_size, cursor=cursor
        )

    def flops(self, batch: ClipBatch) -> float:
        """Operations that training on a micro-batch needs; buckets differ."""
        clips, _, num_frames, height, width = batch.video.shape
        decoded = self.config.diffusion.train_frames
        return clips * training_flops_per_clip(self.config.model, (height, width), num_frames, decoded)

    def build(self, ranks: Ranks = Ranks(), *, resumes: bool = False) -> nn.Module:  # noqa: B008 - frozen
        torch.manual_seed(self.config.train.seed)
        model = build_model(self.config.model)
        if self.config.model.linear_start == "pca" and not resumes:
            # Read and fitted once: a replacement sample on one rank alone would give it a code of its own.
            model.load_state_dict(ranks.on_main(lambda: self._fitted(model)), strict=False)
        model.set_activation_checkpointing(self.config.engine.activation_checkpointing)
        return model

    def _fitted(self, model: Regen | Baseline) -> dict[str, Tensor]:
        """The weights of the linear code that fits the data; `model` has them then."""
        fit_linear_code(model, first_cells(self.data))
        return {name: weight for name, weight in model.state_dict().items() if name.startswith(LINEAR_CODES)}

    def loss(self, engine: Engine, batch: ClipBatch, step: int) -> Loss:
        batch, settings = on_device(batch, self.device), self.config.diffusion
        x0, ids = pixels.to_float(batch.video), batch.keys
        t = timesteps(settings.density, uniforms(self.config.train.seed, ids, step, NoiseStream.TIMESTEP))
        frames = train_frames(self.config, x0.shape[2], step, self.device)
        seen, noise = x0[:, :, frames], self._noise(x0, ids, step, frames)
        x_t = noisy(settings.path, seen, noise, t)
        prediction, latents = engine(
            x0, x_t, t, latent_noise(self.config, x0, ids, step), frames.float().expand(len(ids), -1)
        )
        errors = (prediction - target_of(settings.path, settings.target, seen, noise, t)).square()
        weighted = errors * squared_error_weight(settings.path, settings.target, settings.weighting, t)
        loss = Loss(weighted.mean(), latent_figures(latents, x0.shape[2]))
        if not self.extra_losses:
            return loss
        floor = self.config.train.losses.signal_floor
        share = floor + (1 - floor) * signal_share(settings.path, t)
        made = x0_from(settings.path, settings.target, prediction, x_t, t)
        return self.extra_losses.add(loss, engine, seen, made, share, ids, step)

    def read_validation(self, ranks: Ranks) -> None:
        _ = self._validation_clips

    @torch.no_grad()
    def validate(self, engine: Engine, meet: Callable[[], None] = lambda: None) -> Validation:
        batch = on_device(self._validation_clips, self.device)
        x0, ids = pixels.to_float(batch.video), batch.keys
        settings, every = self.config.diffusion, torch.arange(x0.shape[2], device=self.device)
        noise = self._noise(x0, ids, 0, every)
        t = torch.full((len(ids),), LATEST_EPS_TIME if settings.target == "eps" else 1.0, device=self.device)
        prediction, latents = engine(x0, noise, t, None)
        return validation(x0, x0_from(settings.path, settings.target, prediction, noise, t), latents)

    def _noise(self, x0: Tensor, ids: Tensor, step: int, frames: Tensor) -> Tensor:
        """Draw the noise of these frames [n] of clips."""
        times = frames.expand(x0.shape[0], -1)
        return gaussian(self.config.train.seed, ids, times, (x0.shape[3], x0.shape[4]), draw=step)


class BaselineTask(EmbedderTask):
    """The MAGVIT-v2 style baseline: the same encoder and budget, trained on the pixels' squared error."""

    def loss(self, engine: Engine, batch: ClipBatch, step: int) -> Loss:
        batch = on_device(batch, self.device)
        x0, ids = pixels.to_float(batch.video), batch.keys
        reconstruction, latents = engine(x0, latent_noise(self.config, x0, ids, step))
        loss = Loss(F.mse_loss(reconstruction, x0), latent_figures(latents, x0.shape[2]))
        if not self.extra_losses:
            return loss
        return self.extra_losses.add(loss, engine, x0, reconstruction, torch.ones(len(x0), device=x0.device), ids, step)

    @torch.no_grad()
    def validate(self, engine: Engine, meet: Callable[[], None] = lambda: None) -> Validation:
        batch = self._validation_clips
        x0 = to_float(batch.video, self.device)
        reconstruction, latents = engine(x0, None)
        return validation(x0, reconstruction, latents)


def frozen_encoder(config: ModelConfig) -> dict[str, str]:
    """Return the fingerprint of a third-party encoder, to which its checkpoints are bound; nothing for our own."""
    return {ENCODER_FACT: DiffusersEncoder(config).fingerprint} if config.encoder.frozen else {}


def train_frames(config: EmbedderConfig, num_frames: int, step: int, device: torch.device | None = None) -> Tensor:
    """Numbers of the frames that the decoder is trained on in a step, ascending, int64 [n]: the same for all clips."""
    every = torch.arange(num_frames, device=device)
    wanted = config.diffusion.train_frames
    if wanted is None or wanted >= num_frames:
        return every
    chances = uniforms(config.train.seed, every, step, NoiseStream.FRAMES)[:, 0]
    return chances.argsort(stable=True)[:wanted].sort().values


def latent_noise(config: EmbedderConfig, x0: Tensor, ids: Tensor, step: int) -> Latents | None:
    """Gaussian noise for the latents, keyed like the pixels' noise; None when the config asks for none."""
    std, channels = config.model.latent.noise_std, config.model.latent.channels
    if std == 0:
        return None
    size = (x0.shape[3] // 8, x0.shape[4] // 8)

    def draw(stream: NoiseStream) -> Tensor:
        noise = latent_gaussian(config.train.seed, ids, 1, channels, size, draw=step, stream=stream)
        return std * noise[:, :, 0]  # [B, Z, h, w]

    return Latents(draw(NoiseStream.LATENT_CONTENT), draw(NoiseStream.LATENT_MOTION))


def latent_figures(latents: Latents, num_frames: int) -> dict[str, Tensor]:
    """Return the latents' spread over positions: near 0 a latent carries no information, near 1 it uses its whole
    bound. Images have no motion latent to report."""
    return {
        f"latent_std_{name}": latent.detach().float().std((0, 2, 3)).mean()
        for name, latent in latents._asdict().items()
        if name != "motion" or num_frames > 1
    }


def validation(source: Tensor, reconstruction: Tensor, latents: Latents) -> Validation:
    """Figures of a one-step reconstruction."""
    reconstruction = reconstruction.clamp(-1, 1)
    figures = {"psnr_db": psnr_db(source, reconstruction)}
    figures |= {name: float(value) for name, value in latent_figures(latents, source.shape[2]).items()}
    return Validation(figures, source, reconstruction, f"{figures['psnr_db']:.2f} dB in one step", "one step")
