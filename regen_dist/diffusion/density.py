"""Timestep densities: where in (0, 1] training looks. 1 is pure noise, from where one-step decoding starts.

Times are quantiles of uniform numbers that the counter-based generator draws per (seed, step, sample id), so they do
not depend on ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regen_dist.config.schema import DensityConfig

SMALLEST = 1e-3


def timesteps(config: DensityConfig, uniforms: Tensor) -> Tensor:
    """Diffusion times [B] in [0.001, 1] from uniform numbers [B, >=2].

    The first number is a quantile of the density: uniform, or logit-normal (Esser et al., 2024, Eq. 19); `shift` s
    moves mass towards noise by t -> s t / (1 + (s - 1) t) (same paper, Eq. 23). The second decides the share of samples
    that start from pure noise.
    """
    quantile, chance = uniforms[:, 0], uniforms[:, 1]
    t = (
        quantile
        if config.kind == "uniform"
        else torch.sigmoid(config.mean + config.std * torch.special.ndtri(quantile))
    )
    t = config.shift * t / (1 + (config.shift - 1) * t)
    return torch.where(chance < config.pure_noise, torch.ones_like(t), t.clamp(min=SMALLEST, max=1.0))
