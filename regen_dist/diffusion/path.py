"""Noise paths and prediction targets.

A path takes data x0 to noise e as x_t = alpha(t) x0 + sigma(t) e, with t from 0 (data) to 1 (noise), and has the
velocity v = alpha'(t) x0 + sigma'(t) e. Rectified flow: Liu et al., 2022 (straight lines). Cosine VP: Nichol and
Dhariwal, 2021 (alpha^2 + sigma^2 = 1).

Legend: videos are [B, C, T, H, W]; t is [B].
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, assert_never

import torch
from torch import Tensor

from regen_dist.config.embedder import DensityConfig
from regen_dist.errors import ConfigError

PathName = Literal["rectified_flow", "cosine_vp"]
Target = Literal["x0", "velocity", "eps"]
HALF_PI = math.pi / 2


class Coefficients(NamedTuple):
    """alpha, sigma and their derivatives at t, each [B, 1, 1, 1, 1]."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor

    @property
    def wronskian(self) -> Tensor:
        """sigma' alpha - sigma alpha', the determinant that maps (x_t, v) back to (x0, e); positive on both paths."""
        return self.d_sigma * self.alpha - self.sigma * self.d_alpha


def coefficients(path: PathName, t: Tensor) -> Coefficients:
    """The path's coefficients at diffusion times t [B]."""
    t = t.float().view(-1, 1, 1, 1, 1)
    if path == "rectified_flow":
        return Coefficients(1 - t, t, -torch.ones_like(t), torch.ones_like(t))
    if path == "cosine_vp":
        cos, sin = torch.cos(HALF_PI * t), torch.sin(HALF_PI * t)
        return Coefficients(torch.where(t >= 1, 0.0, cos), sin, -HALF_PI * sin, HALF_PI * cos)
    assert_never(path)


def noisy(path: PathName, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t, in float32."""
    c = coefficients(path, t)
    return c.alpha * x0 + c.sigma * noise


def target_of(path: PathName, target: Target, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return the quantity that the decoder is trained to predict."""
    if target == "x0":
        return x0
    if target == "eps":
        return noise
    if target == "velocity":
        c = coefficients(path, t)
        return c.d_alpha * x0 + c.d_sigma * noise
    assert_never(target)


def x0_from(path: PathName, target: Target, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Return the clean video that a prediction implies.

    Raises:
        ConfigError: target 'eps' at pure noise, where x_t holds no signal and alpha is 0.
    """
    if target == "x0":
        return prediction
    c = coefficients(path, t)
    if target == "velocity":
        return (c.d_sigma * x_t - c.sigma * prediction) / c.wronskian
    if target != "eps":
        assert_never(target)
    if bool((c.alpha <= 0).any()):
        raise ConfigError(
            "a noise prediction (diffusion.target=eps) cannot be turned into pixels at pure noise: "
            "x0 = (x_t - sigma e) / alpha with alpha = 0. One-step decoding needs diffusion.target=x0 or velocity"
        )
    return (x_t - c.sigma * prediction) / c.alpha


def squared_error_weight(
    path: PathName, target: Target, space: Literal["x0", "velocity"], t: Tensor, limit: float = 100.0
) -> Tensor:
    """Return the factor that turns a squared error of the target into one of x0 or of the velocity, [B, 1, 1, 1, 1],
    limited where it diverges.

    For one x_t, an error d in x0 is an error d * alpha / sigma in e and d * wronskian / sigma in v.
    """
    c = coefficients(path, t)
    sigma = c.sigma.clamp(min=1e-4)
    ratio = {"x0": torch.ones_like(sigma), "velocity": c.wronskian / sigma, "eps": c.alpha / sigma}
    return (ratio[space] / ratio[target].clamp(min=1e-4)).square().clamp(max=limit)


def signal_share(path: PathName, t: Tensor) -> Tensor:
    """The share of x_t's variance that is signal, for data of unit variance, [B]."""
    c = coefficients(path, t)
    return (c.alpha.square() / (c.alpha.square() + c.sigma.square())).flatten()


# Timestep densities: the distribution of training times in (0, 1]. 1 is pure noise, where one-step decoding starts.
#
# Times are quantiles of uniform numbers that the counter-based generator draws per (seed, step, sample id), so they
# do not depend on ranks.

SMALLEST = 1e-3


def shifted(t: Tensor, shift: float) -> Tensor:
    """Return times moved towards noise: s t / (1 + (s - 1) t) (Esser et al., 2024, Eq. 23)."""
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
