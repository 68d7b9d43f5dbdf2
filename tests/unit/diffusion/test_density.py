"""Timestep densities are the distributions that they are named after."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from regen_dist.config.embedder import DensityConfig
from regen_dist.diffusion.noise import NoiseStream, uniforms
from regen_dist.diffusion.path import SMALLEST, timesteps

COUNT = 20_000
NUMBERS = uniforms(0, torch.arange(COUNT), 0, NoiseStream.TIMESTEP)


def _quantiles(config: DensityConfig, quantiles: list[float]) -> Tensor:
    """Times for given quantiles, of samples that are not at pure noise."""
    return timesteps(config, torch.tensor([[quantile, 0.999] for quantile in quantiles]))


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["uniform", "logit_normal"])
def test_share_at_pure_noise(kind: str, share: float) -> None:
    """`pure_noise` of the samples start at exactly 1, the others below; all times lie in (0, 1]."""
    t = timesteps(DensityConfig(kind=kind, pure_noise=share), NUMBERS)
    assert t.shape == (COUNT,)
    assert abs((t == 1).double().mean() - share) <= 5 * math.sqrt(share * (1 - share) / COUNT)
    assert t.min() >= SMALLEST > 0
    assert t.max() <= 1


def test_uniform_quantiles() -> None:
    """The quantile is the time, but for the smallest ones."""
    expected = torch.tensor([SMALLEST, 0.1, 0.5, 0.9])
    torch.testing.assert_close(_quantiles(DensityConfig(kind="uniform"), [1e-5, 0.1, 0.5, 0.9]), expected)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-1.2, 1.0), (0.8, 0.5)])
def test_logit_normal_quantiles(mean: float, std: float) -> None:
    """The logit of the median is the mean, and one deviation on either side lies at the normal's quantiles."""
    found = _quantiles(DensityConfig(mean=mean, std=std), [0.158655, 0.5, 0.841345])
    torch.testing.assert_close(found.logit(), torch.tensor([mean - std, mean, mean + std]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["uniform", "logit_normal"])
def test_shift_moves_every_time_towards_noise(kind: str) -> None:
    """A larger shift moves no time towards the data, keeps the order, and is t -> s t / (1 + (s - 1) t)."""
    quantiles = [i / 50 for i in range(1, 50)]
    times = [_quantiles(DensityConfig(kind=kind, shift=shift), quantiles) for shift in (0.5, 1.0, 2.0, 4.0)]
    for smaller, larger in itertools.pairwise(times):
        assert (larger > smaller).all()
        assert (larger.diff() > 0).all()
    torch.testing.assert_close(times[3], 4 * times[1] / (1 + 3 * times[1]))


def test_a_shift_of_the_row_comes_after_that_of_the_config() -> None:
    """Both are one shift of their product; at pure noise nothing moves."""
    config = DensityConfig(shift=2.0, pure_noise=0.25)
    both = timesteps(config, NUMBERS, 1.5)
    torch.testing.assert_close(both, timesteps(DensityConfig(shift=3.0, pure_noise=0.25), NUMBERS))
    assert torch.equal(both == 1, timesteps(config, NUMBERS) == 1)
