"""Latent conditioning C_e: two latent frames to one embedding per latent cell and frame (paper, Fig. 3).

    C_e(x, y, t) = M_s( z_c(x, y) (+) M_t(t; z_m(x, y)) )

with M_t a SIREN (Sitzmann et al., 2020) over a real-valued time and M_s a linear projection.

Legend: B batch, T decoded frames, k temporal compression, h x w latent cells, Z latent channels, M width of the SIREN,
    D width of the transformer.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from regen_dist.config.embedder import ModelConfig
from regen_dist.config.run import SPATIAL_COMPRESSION
from regen_dist.models.attention import BASE, split_pairs
from regen_dist.models.diffusers_encoder import latent_frames
from regen_dist.models.encoder import Latents


class TimeWave(nn.Module):
    """First layer of the SIREN: sin(omega (W t/k + b)), t in frames. [B, T] to [B, T, M]. Always in float32, which the
    phase needs."""

    def __init__(self, k: int, width: int, omega: float) -> None:
        super().__init__()
        self.scale, self.omega = 1.0 / k, omega
        self.weight = nn.Parameter(torch.empty(width).uniform_(-1.0, 1.0))
        self.bias = nn.Parameter(torch.empty(width).uniform_(-math.pi / omega, math.pi / omega))

    def forward(self, times: Tensor) -> Tensor:
        phase = (times.float() * self.scale).unsqueeze(-1) * self.weight.float() + self.bias.float()
        return torch.sin(self.omega * phase).to(self.weight.dtype)


class TimeTable(nn.Module):
    """One learned vector for each of the frames 0, 1, ..., k: the SIREN's first layer in its ablation. [B, T] to
    [B, T, M].

    Between two frames their vectors are interpolated linearly; before the first and past the last frame the nearest
    vector is held.
    """

    def __init__(self, k: int, width: int) -> None:
        super().__init__()
        # About as large as the sines that the layers behind it are initialised for.
        self.vectors = nn.Parameter(torch.empty(k + 1, width).uniform_(-1.0, 1.0))

    def forward(self, times: Tensor) -> Tensor:
        frames = torch.arange(len(self.vectors), device=times.device, dtype=torch.float32)
        at = times.float().clamp(0.0, len(self.vectors) - 1.0).unsqueeze(-1)
        shares = (1 - (at - frames).abs()).clamp(min=0.0)  # [B, T, k+1], of at most two frames
        return (shares @ self.vectors.float()).to(self.vectors.dtype)


class SineLinear(nn.Linear):
    """A linear layer with the SIREN's initialisation, which keeps the variance through a sine."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width)
        nn.init.uniform_(self.weight, -math.sqrt(6.0 / width), math.sqrt(6.0 / width))


class SineLayer(nn.Module):
    """A hidden SIREN layer whose phase and rate the motion latent sets for each cell.

    The modulation has no bias: a motion latent of zeros leaves the layer as it is.
    """

    def __init__(self, width: int, latent_channels: int) -> None:
        super().__init__()
        self.linear = SineLinear(width)
        self.modulation = nn.Linear(latent_channels, 2 * width, bias=False)

    def forward(self, hidden: Tensor, motion: Tensor, share: Tensor) -> Tensor:
        """hidden [B, T, h, w, M] (or with h = w = 1), motion [B, 1, h, w, Z], and the share [B, T, 1, 1, 1] of it that
        counts at each time."""
        rate, phase = (self.modulation(motion) * share).chunk(2, -1)  # [B, T, h, w, M]
        return torch.sin(self.linear(hidden) * (1 + rate) + phase)


class LatentConditioning(nn.Module):
    """C_e: what each token of the decoder is told of its time and its latents.

    Time is a real number of frames from the clip's first: any subset of frames, times between them, and times slightly
    past the clip's end can be asked for.

    First-frame rule (paper, Fig. 3, as we read it): what the SIREN says of the first frame does not depend on the
    motion latent, so that the first frame of a clip and the same frame as an image are conditioned alike. The motion
    latent fades in over the first interval, its weight being min(|t|, 1), which keeps C_e continuous in time.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        conditioning = config.conditioning
        channels, k = config.latent.channels, config.temporal_compression
        self.first_frame_rule = conditioning.first_frame_rule
        self.wave: TimeWave | TimeTable
        if conditioning.time == "siren":
            self.wave = TimeWave(k, conditioning.width, conditioning.omega)
        else:
            self.wave = TimeTable(k, conditioning.width)
        self.layers = nn.ModuleList(SineLayer(conditioning.width, channels) for _ in range(conditioning.layers))
        self.project = nn.Linear(channels + conditioning.width, config.decoder.width)

    def forward(self, latents: Latents, times: Tensor) -> Tensor:
        """Latents [B, Z, h, w] and times [B, T] in frames to C_e [B, T, h, w, D]."""
        content, motion = (latent.movedim(1, -1).unsqueeze(1) for latent in latents)  # [B, 1, h, w, Z]
        share = times.abs().clamp(max=1.0) if self.first_frame_rule else torch.ones_like(times)
        share = share[:, :, None, None, None].to(motion.dtype)  # [B, T, 1, 1, 1]
        hidden = self.wave(times)[:, :, None, None]  # [B, T, 1, 1, M]
        for layer in self.layers:
            hidden = layer(hidden, motion, share)  # [B, T, h, w, M]
        content = content.expand(*hidden.shape[:-1], -1)
        return self.project(torch.cat([content, hidden], -1))  # type: ignore[no-any-return]


class FrameConditioning(nn.Module):
    """C_e of the latent frames of a third-party encoder (ours): any number n of them, any channels, any cell.

    The first latent frame stands for frame 0, the j-th for the r frames (j-1) r + 1 ... j r, so for the time of their
    middle. Each speaks for the times around it by a SIREN over its distance, in latent frames, modulated by itself; at
    a time between two both speak, each by its nearness, so that C_e is continuous in time:

        C_e(x, y, t) = M_s( sum_j w_j(t) [z_j(x, y) (+) M_t(p(t) - j; z_j(x, y))] ),   w_j = max(0, 1 - |p(t) - j|)

    At time 0 the first latent frame speaks alone, so that an image and the first frame of a clip are conditioned alike.
    A cell of more than 8 pixels becomes s x s tokens of the decoder's, by a part of M_s for each.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        conditioning, self.channels = config.conditioning, config.latent.channels
        self.stride, self.split = config.encoder.temporal, config.encoder.spatial // SPATIAL_COMPRESSION
        self.wave = TimeWave(1, conditioning.width, conditioning.omega)
        self.layers = nn.ModuleList(SineLayer(conditioning.width, self.channels) for _ in range(conditioning.layers))
        self.project = nn.Linear(self.channels + conditioning.width, config.decoder.width * self.split**2)

    def positions(self, times: Tensor) -> Tensor:
        """Map times in frames to positions among the latent frames: p(t), piecewise linear, before and past the clip
        too."""
        middle = (self.stride + 1) / 2  # of the second latent frame
        return torch.where(times < middle, times / middle, 1 + (times - middle) / self.stride)

    def forward(self, latents: Latents, times: Tensor) -> Tensor:
        """Latents of n frames and times [B, T] in frames to C_e [B, T, H/8, W/8, D]."""
        frames = latent_frames(latents, self.channels).movedim(2, -1)  # [B, n, h, w, Z]
        at, last = self.positions(times.float()), frames.shape[1] - 1
        below = at.floor().long().clamp(0, max(0, last - 1))
        share = (at - below).clamp(0, 1).where(below < last, 0)
        features = self._weighted_features(frames, below, at, 1 - share) + self._weighted_features(
            frames, (below + 1).clamp(max=last), at, share
        )
        cells = self.project(features).unflatten(-1, (self.split, self.split, -1))  # [B, T, h, w, s, s, D]
        return cells.transpose(3, 4).flatten(4, 5).flatten(2, 3)  # type: ignore[no-any-return]

    def _weighted_features(self, frames: Tensor, index: Tensor, at: Tensor, share: Tensor) -> Tensor:
        """[B, T, h, w, Z + M] of the latent frames `index` [B, T], multiplied by their shares."""
        chosen = torch.stack([row[own] for row, own in zip(frames, index, strict=True)])  # [B, T, h, w, Z]
        whole = torch.ones_like(share)[:, :, None, None, None].to(chosen.dtype)
        hidden = self.wave(at - index)[:, :, None, None]  # [B, T, 1, 1, M]
        for layer in self.layers:
            hidden = layer(hidden, chosen, whole)
        return torch.cat([chosen, hidden], -1) * share[:, :, None, None, None].to(chosen.dtype)


# In-context conditioning: latents as tokens in front of the pixels', all at ordinary positions.
#
# The alternative to C_e in the paper's conditioning ablation. Positions are absolute, in tokens, and encoded by
# sinusoids (Vaswani et al., 2017; over several axes as in DiT, Peebles & Xie, 2023); attention has to learn which
# latent belongs to which pixels.
#
# Legend: B batch, T decoded frames, h x w latent cells, Z latent channels, D width of the transformer.

_CONTENT_AT, _MOTION_AT = -2.0, -1.0  # on the axis of frames: before the clip, where no frame is asked for


class InContext(NamedTuple):
    """Input of the decoder: positions [B, T, h, w, D] to add to the pixel tokens, and tokens [B, 2*h*w, D] to put in
    front of them."""

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
        rows, columns: size of the grid, at places 0, 1, 2, ...
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
    return F.pad(whole, (0, width % 2))  # an odd width leaves one number over


def _waves(at: Tensor, pairs: int) -> Tensor:
    """Sines and cosines of places [...] at falling frequencies, [..., 2 * pairs]."""
    frequencies = BASE ** (-torch.arange(pairs, device=at.device, dtype=torch.float32) / pairs)
    angles = at.unsqueeze(-1) * frequencies
    return torch.cat([angles.sin(), angles.cos()], -1)
