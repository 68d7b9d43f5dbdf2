"""Deterministic samplers from pure noise to video, with any number of steps; one is the default (paper: one step
already reconstructs well).

A denoiser is any function (x_t, t) -> estimate of x0, so that a caller can blend the estimates of overlapping windows
inside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from regen_dist.config.run import SamplerName
from regen_dist.config.t2v import FlowConfig
from regen_dist.diffusion.noise import NoiseStream, uniforms
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
