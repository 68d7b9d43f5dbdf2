"""The terms of `train.losses` beside an embedder's reconstruction loss: perceptual, structural and adversarial
(docs/losses.md).

Each is a mean over samples of a sample's own term, times the sample's share of signal: no term depends on the batch
that a sample is in, nor on the rank.

Legend: B samples, T frames, H x W pixels; n frames that are compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn as nn
from torch import Tensor

from regen_dist.config.embedder import EmbedderConfig
from regen_dist.diffusion.noise import NoiseStream, latent_gaussian
from regen_dist.distributed.discriminator import DiscriminatorTrainer
from regen_dist.distributed.engine import Engine
from regen_dist.models.perceptual import (
    PerceptualNetwork,
    discriminator_loss,
    generator_loss,
    lecam_penalty,
    load_perceptual,
    r1_penalty,
)
from regen_dist.pixels import clip_ssim
from regen_dist.training.task import Loss


class ExtraLosses:
    """The terms that a config asks for; false where it asks for none.

    Args:
        config: config of the run.
        device: device of the rank.

    Raises:
        ConfigError: the perceptual network's file is missing or not in the format.
    """

    def __init__(self, config: EmbedderConfig, device: torch.device) -> None:
        self._losses, self._seed = config.train.losses, config.train.seed
        settings, self._network = self._losses.perceptual, None
        if settings.weight > 0:
            assert settings.network is not None, "what the config refuses"
            smallest = min(min(size) for size in config.data.sizes)
            self._network = load_perceptual(settings.network, device, sha256=settings.sha256, smallest=smallest)

    def __bool__(self) -> bool:
        return self._losses.any

    def add(
        self, loss: Loss, engine: Engine, source: Tensor, made: Tensor, share: Tensor, ids: Tensor, step: int
    ) -> Loss:
        """The loss with the terms. Accumulates the gradients of the discriminator, which `engine.step` updates.

        Args:
            loss: loss of the reconstruction.
            engine: has the discriminator.
            source: clips [B, 3, T, H, W] in [-1, 1].
            made: the model's prediction of them.
            share: weight of each sample, [B].
            ids: ids of the samples, int64 [B].
            step: step of the training.
        """
        extra, figures = torch.zeros((), device=made.device), dict(loss.figures)
        if self._network is not None:
            distance = self._perceptual(self._network, source, made, ids, step)
            extra = extra + self._losses.perceptual.weight * (share * distance).mean()
            figures["perceptual"] = distance.detach().mean()
        if self._losses.ssim.weight > 0:
            dissimilarity = 1 - clip_ssim(source, made)
            extra = extra + self._losses.ssim.weight * (share * dissimilarity).mean()
            figures["dissimilarity"] = dissimilarity.detach().mean()
        if self._losses.adversarial.weight > 0 and step >= self._losses.adversarial.start_step:
            assert engine.discriminator is not None, "built where the weight is above 0"
            figures |= self._train(engine.discriminator, source, made.detach(), share)
            with _frozen(engine.discriminator.module) as discriminator:
                fooled = generator_loss(self._losses.adversarial.loss, discriminator(made))
            extra = extra + self._losses.adversarial.weight * (share * fooled).mean()
            figures["adversarial"] = fooled.detach().mean()
        return loss._replace(figures=figures, extra=extra)

    def _perceptual(self, network: PerceptualNetwork, source: Tensor, made: Tensor, ids: Tensor, step: int) -> Tensor:
        """The mean distance of each sample's frames, [B]."""
        wanted = self._losses.perceptual.frames
        if wanted is not None and wanted < source.shape[2]:
            source, made = (_frames(video, self._drawn(ids, video.shape[2], wanted, step)) for video in (source, made))
        images = (video.transpose(1, 2).flatten(0, 1) for video in (source, made))  # [B*n, 3, H, W]
        return network.distance(*images).view(len(ids), -1).mean(1)

    def _drawn(self, ids: Tensor, num_frames: int, wanted: int, step: int) -> Tensor:
        """Places of `wanted` frames, [B, n]: a function of (seed, step, sample id)."""
        noise = latent_gaussian(self._seed, ids, num_frames, 1, (1, 1), draw=step, stream=NoiseStream.PERCEPTUAL)
        return noise.view(len(ids), num_frames).argsort(1)[:, :wanted]

    def _train(self, trainer: DiscriminatorTrainer, source: Tensor, made: Tensor, share: Tensor) -> dict[str, Tensor]:
        """Accumulate the discriminator's gradients of a micro-batch. Returns figures."""
        config, discriminator = self._losses.adversarial, trainer.module
        penalty = torch.zeros(len(source), device=source.device)
        if config.regularisation == "r1":
            real, penalty = r1_penalty(discriminator, source)
        else:
            real = discriminator(source)
        fake = discriminator(made)
        if config.regularisation == "lecam" and trainer.averages is not None:
            penalty = lecam_penalty(real, fake, trainer.averages)
        losses = discriminator_loss(config.loss, real, fake)
        trainer.backward((share * (losses + config.regularisation_weight * penalty)).mean(), real, fake)
        return {
            "discriminator": losses.detach().mean(),
            "logit_real": real.detach().mean(),
            "logit_fake": fake.detach().mean(),
        }


def _frames(video: Tensor, places: Tensor) -> Tensor:
    """Frames of each sample by their places [B, n]: [B, C, T, H, W] to [B, C, n, H, W]."""
    index = places[:, None, :, None, None].expand(-1, video.shape[1], -1, *video.shape[3:])
    return video.gather(2, index)


@contextmanager
def _frozen(module: nn.Module) -> Iterator[nn.Module]:
    """Freeze a module in the block: gradients pass through it to its inputs alone."""
    module.requires_grad_(False)
    try:
        yield module
    finally:
        module.requires_grad_(True)
