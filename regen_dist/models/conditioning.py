"""Latent conditioning C_e: two latent frames to one embedding per latent cell and frame (paper, Fig. 3).

    C_e(x, y, t) = M_s( z_c(x, y) (+) M_t(t; z_m(x, y)) )

with M_t a SIREN (Sitzmann et al., 2020) over a real-valued time and M_s a linear projection.

Legend: B batch, T decoded frames, k temporal compression, h x w latent cells, Z latent channels, M width of the SIREN,
    D width of the transformer.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
from torch import Tensor

from regen_dist.config.schema import ModelConfig
from regen_dist.models.encoder import Latents


class TimeWave(nn.Module):
    """First layer of the SIREN: sin(omega (W t/k + b)), t in frames. [B, T] to [B, T, M]. Always in float32: the phase
    is what it is about."""

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
    """C_e, the decoder's only positional information.

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
