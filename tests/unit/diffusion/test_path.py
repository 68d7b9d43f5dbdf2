"""Paths and targets: what is predicted stands for exactly one clean video."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from regen_dist.diffusion.path import coefficients, noisy, squared_error_weight, target_of, x0_from
from regen_dist.errors import ConfigError

PATHS = ("rectified_flow", "cosine_vp")
TARGETS = ("x0", "velocity", "eps")
TIMES = torch.tensor([0.05, 0.3, 0.5, 0.9, 0.99])


def _pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, len(TIMES), 3, 2, 4, 4, generator=generator).unbind(0)
    return x0, noise


@pytest.mark.parametrize(("path", "target"), [*itertools.product(PATHS, TARGETS)])
def test_round_trip(path: str, target: str) -> None:
    """x0 comes back from what a perfect decoder would predict, for both paths and every target."""
    x0, noise = _pair()
    x_t = noisy(path, x0, noise, TIMES)
    found = x0_from(path, target, target_of(path, target, x0, noise, TIMES), x_t, TIMES)
    torch.testing.assert_close(found, x0, rtol=1e-3, atol=1e-3)


def test_an_unknown_name_is_not_taken_for_another() -> None:
    """A target or a path that is added to the config alone must not train as the velocity, noise or cosine path."""
    x0, noise = _pair()
    with pytest.raises(AssertionError, match="half_x0"):
        target_of("rectified_flow", "half_x0", x0, noise, TIMES)
    with pytest.raises(AssertionError, match="half_x0"):
        x0_from("rectified_flow", "half_x0", x0, noise, TIMES)
    with pytest.raises(AssertionError, match="curved"):
        coefficients("curved", TIMES)


@pytest.mark.parametrize(("path", "target"), [*itertools.product(PATHS, ("x0", "velocity"))])
def test_round_trip_from_pure_noise(path: str, target: str) -> None:
    """Where one-step decoding starts, x0 and velocity still give the clean video."""
    x0, noise = _pair()
    t = torch.ones(len(TIMES))
    found = x0_from(path, target, target_of(path, target, x0, noise, t), noisy(path, x0, noise, t), t)
    torch.testing.assert_close(found, x0, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_eps_at_pure_noise_is_refused(path: str) -> None:
    """Division by alpha = 0 is an error that names the targets which can do it, not an infinity; one sample of a batch
    at pure noise is enough."""
    x0, noise = _pair()
    t = torch.tensor([0.1, 0.2, 0.3, 0.4, 1.0])
    with pytest.raises(ConfigError, match="target=x0 or velocity"):
        x0_from(path, "eps", noise, noisy(path, x0, noise, t), t)


@pytest.mark.parametrize("path", PATHS)
def test_ends(path: str) -> None:
    """t = 0 is the data, t = 1 is the noise, exactly."""
    x0, noise = _pair()
    assert torch.equal(noisy(path, x0, noise, torch.zeros(5)), x0)
    assert torch.equal(noisy(path, x0, noise, torch.ones(5)), noise)


@pytest.mark.parametrize("path", PATHS)
def test_velocity_is_the_derivative(path: str) -> None:
    """The velocity target is dx_t/dt, by central differences."""
    x0, noise = (tensor.double() for tensor in _pair())
    t, step = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]), 1e-2
    slope = (noisy(path, x0, noise, t + step) - noisy(path, x0, noise, t - step)) / (2 * step)
    torch.testing.assert_close(target_of(path, "velocity", x0, noise, t), slope, rtol=1e-3, atol=1e-3)


def test_the_vp_path_preserves_the_variance() -> None:
    """alpha^2 + sigma^2 = 1 on the cosine path."""
    c = coefficients("cosine_vp", torch.linspace(0, 1, 11))
    torch.testing.assert_close(c.alpha.square() + c.sigma.square(), torch.ones_like(c.alpha))


@pytest.mark.parametrize(("path", "target", "space"), [*itertools.product(PATHS, TARGETS, ("x0", "velocity"))])
def test_weights_equal_the_ratio_of_the_errors(path: str, target: str, space: str) -> None:
    """The weight is the squared error in the weighting's space over that in the target's, for one and the same x_t."""
    x0, noise = (tensor.double() for tensor in _pair())
    x_t, c = noisy(path, x0, noise, TIMES), coefficients(path, TIMES)
    wrong = x0 + 0.1 * torch.randn(x0.shape, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    wrong_noise = (x_t - c.alpha * wrong) / c.sigma

    def error(quantity: str) -> Tensor:
        truth = target_of(path, quantity, x0, noise, TIMES)
        return (target_of(path, quantity, wrong, wrong_noise, TIMES) - truth).square().mean((1, 2, 3, 4))

    ratio = (error(space) / error(target)).float()
    weight = squared_error_weight(path, target, space, TIMES, limit=1e9).flatten()
    torch.testing.assert_close(weight, ratio, rtol=2e-3, atol=1e-6)
    limited = squared_error_weight(path, target, space, TIMES, limit=5.0).flatten()
    torch.testing.assert_close(limited, weight.clamp(max=5.0))


@pytest.mark.parametrize(("path", "target", "space"), [*itertools.product(PATHS, TARGETS, ("x0", "velocity"))])
def test_weights_stay_finite_at_the_ends(path: str, target: str, space: str) -> None:
    """No division by zero where sigma or alpha vanish."""
    weight = squared_error_weight(path, target, space, torch.tensor([1e-3, 1.0]))
    assert weight.isfinite().all()
    assert (weight >= 0).all()
