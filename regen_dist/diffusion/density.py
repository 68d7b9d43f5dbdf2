"""Timestep densities: where in (0, 1] training looks. 1 is pure noise, from where one-step decoding starts.

Times are quantiles of uniform numbers that the counter-based generator draws per (seed, step, sample id), so they do
not depend on ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regen_dist.config.schema import DensityConfig

SMALLEST = 1e-3


def shifted(t: Tensor, shift: float) -> Tensor:
    """Times moved towards noise: s t / (1 + (s - 1) t) (Esser et al., 2024, Eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def timesteps(config: DensityConfig, uniforms: Tensor, shift: float = 1.0) -> Tensor:
    """Diffusion times [B] in [0.001, 1] from uniform numbers [B, >=2].

    The first number is a quantile of the density: uniform, or logit-normal (Esser et al., 2024, Eq. 19); `shift` s
    moves mass towards noise (`shifted`), the config's and the one given after it. The second decides the share of
    samples that start from pure noise.
    """
    quantile, chance = uniforms[:, 0], uniforms[:, 1]
    t = (
        quantile
        if config.kind == "uniform"
        else torch.sigmoid(config.mean + config.std * torch.special.ndtri(quantile))
    )
    t = shifted(shifted(t, config.shift), shift)
    return torch.where(chance < config.pure_noise, torch.ones_like(t), t.clamp(min=SMALLEST, max=1.0))
