"""In-context conditioning: latents as tokens in front of the pixels', all at ordinary positions.

The rival of C_e in the paper's conditioning ablation. Positions are absolute, in tokens, and told by sinusoids (Vaswani
et al., 2017; over several axes as in DiT, Peebles & Xie, 2023); which latent belongs to which pixels is for attention
to find out.

Legend: B batch, T decoded frames, h x w latent cells, Z latent channels, D width of the transformer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from regen_dist.config.schema import ModelConfig
from regen_dist.models.encoder import Latents
from regen_dist.models.rotary import BASE, split_pairs

_CONTENT_AT, _MOTION_AT = -2.0, -1.0  # on the axis of frames: before the clip, where no frame is asked for


class InContext(NamedTuple):
    """What the decoder is told: positions [B, T, h, w, D] to add to the pixel tokens, and tokens [B, 2*h*w, D] to put
    in front of them."""

    positions: Tensor
    tokens: Tensor


class InContextConditioning(nn.Module):
    """Each latent cell as one token, content before motion. Times are real numbers of frames, as everywhere.

    Images have the motion tokens too, of their motion latent of zeros.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.width = config.decoder.width
        self.content = nn.Linear(config.latent.channels, self.width)
        self.motion = nn.Linear(config.latent.channels, self.width)

    def forward(self, latents: Latents, times: Tensor) -> InContext:
        """Latents [B, Z, h, w] and times [B, T] in frames."""
        content, motion = (latent.movedim(1, -1) for latent in latents)  # [B, h, w, Z]
        rows, columns = content.shape[1:3]
        kinds = torch.tensor([[_CONTENT_AT, _MOTION_AT]], device=content.device)
        tokens = torch.stack([self.content(content), self.motion(motion)], 1)  # [B, 2, h, w, D]
        tokens = tokens + sinusoids(kinds, rows, columns, self.width).to(tokens.dtype)
        positions = sinusoids(times, rows, columns, self.width).to(tokens.dtype)  # [B, T, h, w, D]
        return InContext(positions, tokens.flatten(1, 3))


def sinusoids(times: Tensor, rows: int, columns: int, width: int) -> Tensor:
    """Positional embeddings of a grid of tokens, a third of `width` for each of time, row and column.

    Args:
        times: [B, T] real.
        rows, columns: of the grid, at places 0, 1, 2, ...
        width: D.

    Returns:
        [B, T, rows, columns, D] in float32.
    """
    places = (torch.arange(side, device=times.device, dtype=torch.float32) for side in (rows, columns))
    axes = zip((times.float(), *places), split_pairs(width), strict=True)
    time, row, column = (_waves(at, pairs) for at, pairs in axes)
    shape = (*times.shape, rows, columns, -1)
    parts = time[:, :, None, None], row[:, None], column
    whole = torch.cat([part.expand(shape) for part in parts], -1)
    return F.pad(whole, (0, width % 2))  # an odd width has a number left over


def _waves(at: Tensor, pairs: int) -> Tensor:
    """Sines and cosines of places [...] at falling frequencies, [..., 2 * pairs]."""
    frequencies = BASE ** (-torch.arange(pairs, device=at.device, dtype=torch.float32) / pairs)
    angles = at.unsqueeze(-1) * frequencies
    return torch.cat([angles.sin(), angles.cos()], -1)
