"""The 3D patch discriminator of the adversarial loss, and the losses of both sides.

After PatchGAN (Isola et al., 2017) with 3D convolutions, as VidTok (Tang et al., 2024) and MAGVIT-v2 (Yu et al., 2024)
train video tokenizers. Its normalisation is within a sample (GroupNorm): a batch norm would let a sample's loss depend
on the batch, and so on the number of ranks.

Legend: B batch, T frames, H x W pixels; t, h, w patches; N layers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from regen_dist.config.losses import AdversarialConfig

_GROUPS = 8
_WIDEST = 8  # channels of the widest layer, in those of the first
_SLOPE = 0.2


class PatchDiscriminator(nn.Module):
    """Video in [-1, 1] to one logit a patch, high for a source: [B, 3, T, H, W] to [B, 1, t, h, w] with t = T / 2^N and
    h = H / 2^(N+1), rounded up: any size goes, single frames too."""

    def __init__(self, config: AdversarialConfig) -> None:
        super().__init__()
        channels = config.channels
        layers: list[nn.Module] = [nn.Conv3d(3, channels, 3, (1, 2, 2), 1), nn.LeakyReLU(_SLOPE)]
        for _ in range(config.layers):
            wider = min(2 * channels, _WIDEST * config.channels)
            layers += [nn.Conv3d(channels, wider, 3, 2, 1), nn.GroupNorm(_GROUPS, wider), nn.LeakyReLU(_SLOPE)]
            channels = wider
        self.layers = nn.Sequential(*layers, nn.Conv3d(channels, 1, 3, 1, 1))

    def forward(self, video: Tensor) -> Tensor:
        return self.layers(video)  # type: ignore[no-any-return]


def generator_loss(kind: str, fake: Tensor) -> Tensor:
    """The adversarial loss of each reconstruction, [B], from its logits [B, 1, t, h, w]."""
    losses = -fake if kind == "hinge" else F.softplus(-fake)
    return losses.mean((1, 2, 3, 4))


def discriminator_loss(kind: str, real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss of each pair of source and reconstruction, [B], from their logits."""
    hinge = kind == "hinge"
    losses = F.relu(1 - real) + F.relu(1 + fake) if hinge else F.softplus(-real) + F.softplus(fake)
    return losses.mean((1, 2, 3, 4))


def r1_penalty(discriminator: nn.Module, video: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of sources, and half the squared gradient of each one's mean logit by its pixels, [B], which carries
    gradients itself (Mescheder et al., 2018, Eq. 9)."""
    video = video.detach().requires_grad_()
    logits = discriminator(video)
    (slope,) = torch.autograd.grad(logits.mean((1, 2, 3, 4)).sum(), video, create_graph=True)
    return logits, 0.5 * slope.square().sum((1, 2, 3, 4))


class LogitAverages(NamedTuple):
    """Moving averages, over steps, of the logits of sources and of reconstructions."""

    real: float
    fake: float


def lecam_penalty(real: Tensor, fake: Tensor, averages: LogitAverages) -> Tensor:
    """Squared excess of each pair's logits over the other side's moving average, [B] (LeCAM; Tseng et al., 2021, in
    the form of its authors' code)."""
    excess = F.relu(real - averages.fake).square() + F.relu(averages.real - fake).square()
    return excess.mean((1, 2, 3, 4))
