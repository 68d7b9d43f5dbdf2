"""The diffusion time's way into a transformer: adaLN-single (Peebles & Xie, 2023; Chen et al., 2024, PixArt-alpha).

Legend: B batch, L tokens, D width.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from regen_dist.models.layers import ZeroLinear

NUM_FREQUENCIES = 128


class TimestepEmbedding(nn.Module):
    """The diffusion time t in (0, 1] to one modulation vector, [B] to [B, D], through sinusoids and a two-layer
    network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2 * NUM_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())

    def forward(self, t: Tensor) -> Tensor:
        steps = torch.arange(NUM_FREQUENCIES, device=t.device, dtype=torch.float32)
        frequencies = 1000.0 * torch.exp(-math.log(10000.0) / NUM_FREQUENCIES * steps)
        angles = t.float()[:, None] * frequencies
        waves = torch.cat([angles.cos(), angles.sin()], -1).to(next(self.parameters()).dtype)
        return self.net(waves)  # type: ignore[no-any-return]


class Modulation(nn.Module):
    """adaLN: the timestep's vector to `parts` vectors of width D for all blocks, [B, D] to [B, parts, D].

    One projection serves every block, and each block adds a table of its own (adaLN-single, PixArt-alpha). Zero at the
    start, so that the gates of all blocks are closed and the transformer begins as the identity.
    """

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.linear = ZeroLinear(width, parts * width)

    def forward(self, vector: Tensor) -> Tensor:
        return self.linear(vector).unflatten(-1, (self.parts, -1))  # type: ignore[no-any-return]


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Layer norm without parameters of its own, then scale and shift. x [B, L, D], scale and shift [B, 1, D]."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:]), 1 + scale)
