"""Noise paths, prediction targets, and deterministic samplers along a path.

A path takes data x0 to noise e as x_t = alpha(t) x0 + sigma(t) e, with t from 0 (data) to 1 (noise), and has the
velocity v = alpha'(t) x0 + sigma'(t) e. Rectified flow: Liu et al., 2022 (straight lines). Cosine VP: Nichol and
Dhariwal, 2021 (alpha^2 + sigma^2 = 1).

Legend: videos are [B, C, T, H, W]; t is [B].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple, assert_never

import torch
from torch import Tensor

from regen_dist.config.embedder import DensityConfig
from regen_dist.config.run import SamplerName
from regen_dist.config.t2v import FlowConfig
from regen_dist.diffusion.noise import NoiseStream, uniforms
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


# Samplers from pure noise to video, with any number of steps; one is the default (paper: one step already reconstructs
# well). A denoiser is any function (x_t, t) -> estimate of x0, so that a caller can blend the estimates of overlapping
# windows inside it.

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
    times[0] = 1.0  # a shifted 1 may be rounded to more, where log(alpha) is NaN
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


# Given latent frames, which are not generated: the image that a video begins with, or the clips that it continues.
#
# A given frame stays clean, has the time of clean data (0) and counts for no loss; the others attend to it. The content
# latent depends on a clip's first frame alone (paper, Sec. 3), so an image alone gives the content of the first clip.
#
# Legend: B rows, C channels, F latent frames (content, motion, content, motion, ...), h x w latent cells.


_CLIP_FRAMES = 2  # content and motion


@dataclass(frozen=True, eq=False)
class GivenFrames:
    """Frames of rows that are given: `clean` [B, C, F, h, w] is used where `mask`, bool [B, F], is True."""

    clean: Tensor
    mask: Tensor

    @classmethod
    def joined(cls, rows: Sequence[GivenFrames]) -> GivenFrames:
        """Join rows of one shape into a batch."""
        return cls(torch.cat([row.clean for row in rows]), torch.cat([row.mask for row in rows]))

    def times(self, t: Tensor) -> Tensor:
        """Return the times of the frames, [B, F], from the times [B] of their rows: 0 for given frames."""
        return torch.where(self.mask, 0.0, t[:, None])

    def put_into(self, x: Tensor) -> Tensor:
        """Return x [B, C, F, h, w] with the given frames in place."""
        return torch.where(self.mask[:, None, :, None, None], self.clean.to(x.dtype), x)


def draw_given_frames(flow: FlowConfig, seed: int, keys: Tensor, step: int, clean: Tensor) -> GivenFrames | None:
    """Choose the given frames of a training step: a function of (seed, step, sample), independent of batch and rank.

    Args:
        flow: holds the share of rows with a given first content latent, and the share with whole first clips given.
        seed: seed of the run.
        keys: keys of the rows, int64 [B].
        step: step of the training.
        clean: the rows, [B, C, F, h, w]; an image alone (F = 1) is never given.

    Returns:
        None if the config gives no frames.
    """
    if not flow.gives_frames:
        return None
    content, clips, frames = flow.given_content, flow.given_clips, clean.shape[2]
    chance, quantile = uniforms(seed, keys, step, NoiseStream.GIVEN)[:, :2].unbind(1)  # [B] each
    most = max(frames // _CLIP_FRAMES - 1, 0)  # clips that may be given: one at least is generated
    some = (quantile * most).long() + min(most, 1)  # [B], 1 ... most alike
    counts = torch.where(chance < content, min(frames - 1, 1), _CLIP_FRAMES * some)
    counts = torch.where(chance < content + clips, counts, 0)
    return GivenFrames(clean, torch.arange(frames, device=keys.device) < counts[:, None])


def error_without_given(prediction: Tensor, target: Tensor, given: GivenFrames) -> Tensor:
    """Mean squared error over the frames that are not given, each row with the same weight."""
    squares = (prediction - target).square().mean((1, 3, 4))  # [B, F]
    rest = ~given.mask
    return ((squares * rest).sum(1) / rest.sum(1)).mean()
