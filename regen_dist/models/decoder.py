"""The generative decoder: a diffusion transformer on the pixels of a clip (paper, Sec. 3; blocks after DiT, Peebles &
Xie 2023).

Legend: B batch, T frames, H x W pixels, h = H/8, w = W/8, P = 8, L = T*h*w tokens, N heads, D width.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from regen_dist.config.schema import SPATIAL_COMPRESSION as P
from regen_dist.config.schema import DecoderConfig
from regen_dist.models.attention import Grid, attention
from regen_dist.models.layers import Checkpointed, ZeroLinear
from regen_dist.models.modulation import Modulation, TimestepEmbedding, modulate


def fold_tokens(video: Tensor) -> Tensor:
    """[B, 3, T, H, W] to [B, L, 3*P*P]: one token per latent cell and frame."""
    b, c, t, height, width = video.shape
    patches = video.reshape(b, c, t, height // P, P, width // P, P)
    return patches.permute(0, 2, 3, 5, 1, 4, 6).reshape(b, -1, c * P * P)


def unfold_tokens(tokens: Tensor, grid: Grid) -> Tensor:
    """[B, L, 3*P*P] to [B, 3, T, H, W]."""
    t, h, w = grid
    patches = tokens.reshape(-1, t, h, w, 3, P, P)
    return patches.permute(0, 4, 1, 2, 5, 3, 6).reshape(-1, 3, t, h * P, w * P)


class Block(nn.Module):
    """Self-attention and a two-layer network, both behind adaLN gates. Odd blocks shift their attention windows."""

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        width, hidden = config.width, int(config.width * config.mlp_ratio)
        self.heads, self.attention, self.shifted = config.heads, config.attention, index % 2 == 1
        self.table = nn.Parameter(torch.zeros(6, width))
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)

    def forward(self, x: Tensor, modulation: Tensor, grid: Grid) -> Tensor:
        """x [B, L, D], modulation [B, 6, D]."""
        parts = (modulation + self.table).unsqueeze(2).unbind(1)  # six of [B, 1, D]
        x = torch.addcmul(x, parts[2], self._attend(modulate(x, parts[0], parts[1]), grid))
        return torch.addcmul(x, parts[5], self.contract(F.gelu(self.expand(modulate(x, parts[3], parts[4])))))

    def _attend(self, x: Tensor, grid: Grid) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # [B, N, L, E] each
        mixed = attention(q, k, v, grid, self.attention, self.shifted)
        return self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class GenerativeDecoder(Checkpointed):
    """Noisy pixels, diffusion time and C_e to a prediction in pixel space."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed = nn.Linear(3 * P * P, config.width)
        self.timestep = TimestepEmbedding(config.width)
        self.modulation = Modulation(config.width, 6)
        self.noise_gate = Modulation(config.width, 1)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.blocks))
        self.final_modulation = Modulation(config.width, 2)
        self.head = ZeroLinear(config.width, 3 * P * P)

    def forward(self, noisy: Tensor, t: Tensor, conditioning: Tensor) -> Tensor:
        """noisy [B, 3, T, H, W], t [B], conditioning C_e [B, T, h, w, D] to a prediction [B, 3, T, H, W] in float32."""
        grid: Grid = (noisy.shape[2], noisy.shape[3] // P, noisy.shape[4] // P)
        vector = self.timestep(t)
        modulation = self.modulation(vector)
        seen = self.embed(fold_tokens(noisy.to(self.embed.weight.dtype)))  # [B, L, D]
        x = torch.addcmul(conditioning.flatten(1, 3), seen, self.noise_gate(vector))
        for block in self.blocks:
            x = self.run(block, x, modulation, grid=grid)
        scale, shift = self.final_modulation(vector).unsqueeze(2).unbind(1)
        pixels = self.head(modulate(x, scale, shift))
        return unfold_tokens(pixels.float(), grid)
