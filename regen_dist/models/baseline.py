"""The baseline's decoder: the encoder's stages mirrored, causal, from two latent frames to a clip (after MAGVIT-v2,
continuous latents).

Legend: B batch, T frames, h x w latent cells, H = 8h, W = 8w.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from regen_dist.config.embedder import ModelConfig
from regen_dist.models.encoder import Latents
from regen_dist.models.layers import (
    CausalConv,
    CausalUpsample,
    ChannelNorm,
    Checkpointed,
    Frames,
    ResidualBlock,
    ZeroConv,
    join_first,
    unfold_patches,
)
from regen_dist.models.linear import LinearDecoder


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
        self.head = ZeroConv(channels, 3 * self.patch**2)
        self.linear = LinearDecoder(config) if config.decoder.linear else None

    def forward(self, latents: Latents, num_frames: int) -> Tensor:
        motion = latents.motion.unsqueeze(2) if num_frames > 1 else None
        frames = self.stem(Frames(latents.content, motion))
        for layer in self.layers:
            frames = self.run(layer, frames)
        frames = self.head(self.norm(frames).map(F.silu))
        decoded = join_first(unfold_patches(frames, self.patch)).float()
        if self.linear is None:
            return decoded
        times = torch.arange(num_frames, device=latents.content.device, dtype=torch.float32)
        return decoded + self.linear(*latents, times.expand(len(latents.content), -1))  # type: ignore[no-any-return]
