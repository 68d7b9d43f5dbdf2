"""Deterministic samplers from pure noise to video, with any number of steps; one is the default (paper: one step
already reconstructs well).

A denoiser is any function (x_t, t) -> estimate of x0, so that a caller can blend the estimates of overlapping windows
inside it.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from regen_dist.config.run import SamplerName
from regen_dist.diffusion.path import PathName, coefficients, shifted
from regen_dist.errors import ConfigError

Denoiser = Callable[[Tensor, Tensor], Tensor]


def sample(
    denoise: Denoiser,
    noise: Tensor,
    *,
    path: PathName,
    steps: int = 1,
    method: SamplerName = "euler",
    shift: float = 1.0,
) -> Tensor:
    """Integrate from noise (t = 1) to data (t = 0) in equal steps of t, or of a shifted t.

    Args:
        denoise: (x_t [B, C, T, H, W], t [B]) to the estimate of x0.
        noise: the starting point.
        path: the noise path that the model was trained on.
        steps: evaluations for `euler` and `dpmpp_2m`; `heun` takes two for each step but the last.
        method: `euler` keeps the noise that x0 implies (DDIM; Euler's rule on a rectified flow); `heun` averages the
            velocities at both ends of the step (second order); `dpmpp_2m` extrapolates the estimate of x0 from this
            step and the one before (DPM-Solver++(2M), Lu et al., 2022, Alg. 2; second order at one evaluation a step).
        shift: s takes steps at s t / (1 + (s - 1) t): above 1 more of them near noise (Esser et al., 2024, Eq. 23).

    Raises:
        ConfigError: fewer than one step.
    """
    if steps < 1:
        raise ConfigError(f"the number of sampling steps must be at least 1, found {steps}")
    times = shifted(torch.linspace(1.0, 0.0, steps + 1), shift)
    x = noise
    last: tuple[Tensor, Tensor] | None = None  # time and estimate of the step before
    for now, then in pairwise(times):
        x0 = denoise(x, now.expand(x.shape[0]))
        if then == 0:
            return x0
        if method == "dpmpp_2m":
            middle = x0 if last is None else _extrapolated(path, last, (now, x0), then)
            x, last = _move(path, x, middle, now, then), (now, x0)
            continue
        ahead = _move(path, x, x0, now, then)
        if method == "heun":
            later = denoise(ahead, then.expand(x.shape[0]))
            slope = _velocity(path, x, x0, now) + _velocity(path, ahead, later, then)
            ahead = x + (then - now).to(x.device) * slope / 2
        x = ahead
    return x


def _move(path: PathName, x: Tensor, x0: Tensor, now: Tensor, then: Tensor) -> Tensor:
    """Move from x_now to x_then along the noise that x0 implies."""
    a, b = (coefficients(path, time.view(1).to(x.device)) for time in (now, then))
    return b.alpha * x0 + b.sigma * (x - a.alpha * x0) / a.sigma


def _extrapolated(path: PathName, last: tuple[Tensor, Tensor], this: tuple[Tensor, Tensor], then: Tensor) -> Tensor:
    """Return the estimate of x0 for a step, extrapolated linearly in lambda = log(alpha / sigma) to the middle of the
    step. If the previous step began at pure noise, where lambda is not finite, there is no slope, and this step's own
    estimate is kept."""
    (before, old), (now, new) = last, this
    ends = (coefficients(path, time.view(1)) for time in (before, now, then))
    first, middle, end = (float((c.alpha / c.sigma).log()) for c in ends)
    return new + (end - middle) / (2 * (middle - first)) * (new - old)


def _velocity(path: PathName, x: Tensor, x0: Tensor, time: Tensor) -> Tensor:
    """dx/dt at x_t, given the estimate of x0."""
    c = coefficients(path, time.view(1).to(x.device))
    return c.d_alpha * x0 + c.d_sigma * (x - c.alpha * x0) / c.sigma
