"""The baseline's decoder: the encoder's stages mirrored, causal, from two latent frames to a clip (after MAGVIT-v2,
continuous latents).

Legend: B batch, T frames, h x w latent cells, H = 8h, W = 8w.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from regen_dist.config.schema import SPATIAL_COMPRESSION, ModelConfig
from regen_dist.models.encoder import Latents
from regen_dist.models.layers import (
    CausalConv,
    CausalUpsample,
    ChannelNorm,
    Checkpointed,
    Frames,
    ResidualBlock,
    ZeroLinear,
    join_first,
    unfold_patches,
)


class PatchDecoder(nn.Module):
    """The linear part of the decoder, the mirror of `PatchEncoder`: pixels as a linear map of the latents of their
    cell."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        pixels, channels = 3 * SPATIAL_COMPRESSION**2, config.latent.channels
        self.first = ZeroLinear(channels, pixels)
        self.rest = ZeroLinear(2 * channels, pixels * config.temporal_compression)

    def forward(self, latents: Latents, num_frames: int) -> Frames:
        """Latents [B, 8, h, w] to pixels [B, 3, H, W] and [B, 3, k, H, W]."""
        first = self.first(latents.content.movedim(1, -1)).movedim(-1, 1)
        if num_frames == 1:
            return unfold_patches(Frames(first, None), SPATIAL_COMPRESSION)
        rest = self.rest(torch.cat(latents, 1).movedim(1, -1)).movedim(-1, 1)  # [B, 192 k, h, w]
        return unfold_patches(Frames(first, rest.unflatten(1, (-1, num_frames - 1))), SPATIAL_COMPRESSION)


class ConvDecoder(Checkpointed):
    """Latents [B, 8, h, w] to pixels [B, 3, T, H, W]; the motion latent is a second latent frame."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.patch = config.encoder.stem_patch
        channels = config.encoder.stages[-1].channels
        self.stem = CausalConv(config.latent.channels, channels)
        layers: list[nn.Module] = [ResidualBlock(channels, channels) for _ in range(config.encoder.out_blocks)]
        for stage in reversed(config.encoder.stages):
            if stage.spatial * stage.temporal > 1:
                layers.append(CausalUpsample(channels, stage.channels, stage.spatial, stage.temporal))
                channels = stage.channels
            for _ in range(stage.blocks):
                layers.append(ResidualBlock(channels, stage.channels))
                channels = stage.channels
        self.layers = nn.ModuleList(layers)
        self.norm = ChannelNorm(channels)
        self.head = CausalConv(channels, 3 * self.patch**2)
        self.shortcut = PatchDecoder(config)

    def forward(self, latents: Latents, num_frames: int) -> Tensor:
        motion = latents.motion.unsqueeze(2) if num_frames > 1 else None
        frames = self.stem(Frames(latents.content, motion))
        for layer in self.layers:
            frames = self.run(layer, frames)
        frames = self.head(frames.map(self.norm).map(F.silu))
        return join_first(unfold_patches(frames, self.patch).add(self.shortcut(latents, num_frames))).float()
