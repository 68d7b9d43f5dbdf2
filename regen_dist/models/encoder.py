"""Causal 3D-convolutional encoder: a clip to two latent frames (paper, Sec. 3 and Fig. 3; architecture after
MAGVIT-v2).

Legend: B batch, k temporal compression, H x W pixels, h = H/8, w = W/8.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from regen_dist.config.embedder import ModelConfig
from regen_dist.config.run import SPATIAL_COMPRESSION
from regen_dist.errors import DataError
from regen_dist.models.layers import (
    CausalConv,
    ChannelNorm,
    Checkpointed,
    ResidualBlock,
    ZeroConv,
    fold_patches,
    split_first,
)
from regen_dist.models.linear import LinearEncoder


class Latents(NamedTuple):
    """Latents of a clip: the content latent and the motion latent, [B, 8, h, w] each.

    The content latent is a function of the first frame alone. The motion latent of an image is all zeros, the centre of
    the ball in which latents lie: nothing moves.
    """

    content: Tensor
    motion: Tensor


def bound_latent(latent: Tensor) -> Tensor:
    """Bound a latent by construction: z / sqrt(1 + mean z^2) over the channels of each cell. Shape [B, C, h, w].

    The RMS over the channels stays below 1 whatever the encoder does, and small latents pass unchanged, so that, unlike
    on a sphere (RMS of exactly 1), the magnitude still carries information: docs/embedder.md has the measurement.
    """
    return latent * torch.rsqrt(1 + latent.float().square().mean(1, keepdim=True)).to(latent.dtype)


def check_clip(video: Tensor, num_frames: int) -> None:
    """Refuse a video that the encoder has no latent for.

    Raises:
        DataError: not [B, 3, T, H, W], T neither 1 nor k+1, or sides that are no multiples of 8.
    """
    if video.ndim != 5 or video.shape[1] != 3:
        raise DataError(f"a clip has the shape [batch, 3, frames, height, width], found {list(video.shape)}")
    frames, height, width = video.shape[2:]
    if frames not in (1, num_frames):
        raise DataError(
            f"a clip has {num_frames} frames (an image 1), found {frames}; cut the video into clips of {num_frames}"
        )
    if not height or not width or height % SPATIAL_COMPRESSION or width % SPATIAL_COMPRESSION:
        raise DataError(
            f"sides must be multiples of {SPATIAL_COMPRESSION}, found {height}x{width}; pad or crop the video first"
        )


class Encoder(Checkpointed):
    """Video [B, 3, T, H, W] in [-1, 1], T = k+1 or 1, to `Latents`.

    No operation mixes frames but the causal convolutions, and none of them shows the first frame a later one.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_frames, self.patch = config.num_frames, config.encoder.stem_patch
        channels = config.encoder.stages[0].channels
        self.stem = CausalConv(3 * self.patch**2, channels)
        layers: list[nn.Module] = []
        for stage in config.encoder.stages:
            for _ in range(stage.blocks):
                layers.append(ResidualBlock(channels, stage.channels))
                channels = stage.channels
            if stage.spatial * stage.temporal > 1:
                layers.append(CausalConv(channels, channels, spatial=stage.spatial, temporal=stage.temporal))
        layers += [ResidualBlock(channels, channels) for _ in range(config.encoder.out_blocks)]
        self.layers = nn.ModuleList(layers)
        self.norm = ChannelNorm(channels)
        self.head = ZeroConv(channels, config.latent.channels)
        self.linear = LinearEncoder(config)

    def forward(self, video: Tensor) -> Latents:
        check_clip(video, self.num_frames)
        clip = split_first(video.to(self.stem.weight.dtype))
        frames = self.stem(fold_patches(clip, self.patch))
        for layer in self.layers:
            frames = self.run(layer, frames)
        frames = self.head(self.norm(frames).map(F.silu)).add(self.linear(clip))
        content = bound_latent(frames.first)
        return Latents(
            content, torch.zeros_like(content) if frames.rest is None else bound_latent(frames.rest[:, :, 0])
        )
