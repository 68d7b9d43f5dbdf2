"""Paths and targets: what is predicted stands for exactly one clean video."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from regen_dist.diffusion.path import Denoiser, coefficients, noisy, sample, squared_error_weight, target_of, x0_from
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


METHODS = ("euler", "heun", "dpmpp_2m")
MEAN, STD = 0.7, 0.6  # of the data, which is Gaussian: then everything is known in closed form


def _noise() -> Tensor:
    return torch.linspace(-2, 2, 24, dtype=torch.double).reshape(2, 3, 1, 2, 2)


def _posterior_mean(path: str) -> Denoiser:
    """E[x0 | x_t] for x0 ~ N(MEAN, STD^2): what a perfectly trained decoder would say."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        c = coefficients(path, t)
        gain = c.alpha * STD**2 / (c.alpha**2 * STD**2 + c.sigma**2)
        return MEAN + gain * (x - c.alpha * MEAN)

    return denoise


def _error(path: str, method: str, steps: int) -> float:
    """Distance to the exact end of the flow: x_t keeps its place among the marginal's quantiles, so x_0 = MEAN + STD
    x_1."""
    found = sample(_posterior_mean(path), _noise(), path=path, steps=steps, method=method)
    return float((found - (MEAN + STD * _noise())).abs().max())


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("path", PATHS)
def test_an_oracle_is_exact_in_any_number_of_steps(path: str, method: str, steps: int) -> None:
    """If the denoiser knows x0, every sampler returns it, from one step on."""
    x0 = torch.randn(2, 3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample(lambda x, t: x0, _noise(), path=path, steps=steps, method=method), x0)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("path", PATHS)
def test_order_of_convergence(path: str, method: str, order: int) -> None:
    """Twice the steps divide the error by 2 (Euler) or by 4 (Heun), on a flow whose end is known exactly."""
    errors = [_error(path, method, steps) for steps in (32, 64, 128)]
    orders = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert orders == pytest.approx([order, order], abs=0.25)
    assert errors[-1] < 0.02


@pytest.mark.parametrize("path", PATHS)
def test_heun_is_better_at_equal_evaluations(path: str) -> None:
    """Worth its second evaluation once there are a few steps."""
    assert _error(path, "heun", 16) < _error(path, "euler", 31)


@pytest.mark.parametrize(
    ("method", "steps", "calls"),
    [("euler", 1, 1), ("euler", 4, 4), ("heun", 1, 1), ("heun", 4, 7), ("dpmpp_2m", 1, 1), ("dpmpp_2m", 4, 4)],
)
def test_evaluations(method: str, steps: int, calls: int) -> None:
    """One evaluation a step, by Heun two for all but the last; they start at pure noise and never ask for t = 0."""
    seen: list[float] = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (2,)
        seen.append(float(t[0]))
        return x

    sample(denoise, _noise(), path="rectified_flow", steps=steps, method=method)
    assert len(seen) == calls
    assert seen[0] == 1
    assert min(seen) > 0


@pytest.mark.parametrize("path", PATHS)
def test_order_of_dpmpp(path: str) -> None:
    """Second order up to a logarithm: near both ends of the flow equal steps of t are ever longer ones of lambda, and
    together cost log(steps) / steps^2. So the order comes to 2 from below."""
    errors = [_error(path, "dpmpp_2m", steps) for steps in (128, 256, 512)]
    orders = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    with_logarithm = [2 - math.log2(math.log(2 * steps) / math.log(steps)) for steps in (128, 256)]
    assert orders == pytest.approx(with_logarithm, abs=0.2)
    assert orders[0] < orders[1] < 2


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("steps", [8, 16])
def test_dpmpp_is_better_at_few_evaluations(path: str, steps: int) -> None:
    """Than Euler by far, and than Heun, who has half the steps for as many evaluations."""
    found = _error(path, "dpmpp_2m", steps)
    assert found < _error(path, "euler", steps) / 2.5
    assert found < _error(path, "heun", steps // 2)


def test_dpmpp_is_that_of_the_paper() -> None:
    """Against DPM-Solver++(2M) written out in lambda and h (Lu et al., 2022, Alg. 2), between two times inside (0, 1):
    the second step from the third."""
    seen: list[tuple[Tensor, Tensor]] = []
    denoise = _posterior_mean("rectified_flow")

    def told(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x, t[:1].double()))
        return denoise(x, t)

    sample(told, _noise(), path="rectified_flow", steps=6, method="dpmpp_2m")
    data = [denoise(x, t.expand(2)) for x, t in seen]
    for n in range(2, 5):  # from the first step whose predecessor is not pure noise
        before, now, then = (torch.log((1 - t) / t) for _, t in seen[n - 1 : n + 2])
        h, r = then - now, (now - before) / (then - now)
        mixed = (1 + 1 / (2 * r)) * data[n] - 1 / (2 * r) * data[n - 1]
        wanted = seen[n + 1][1] / seen[n][1] * seen[n][0] - (1 - seen[n + 1][1]) * torch.expm1(-h) * mixed
        torch.testing.assert_close(seen[n + 1][0], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_shifted_steps(shift: float) -> None:
    """Times are s t / (1 + (s - 1) t) of equal ones: above 1 most of them near noise; both ends stay."""
    seen: list[float] = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        seen.append(float(t[0]))
        return x

    sample(denoise, _noise(), path="rectified_flow", steps=4, shift=shift)
    assert seen == pytest.approx([shift * t / (1 + (shift - 1) * t) for t in (1.0, 0.75, 0.5, 0.25)])
    assert (sum(seen) / 4 > 0.625) == (shift > 1)


@pytest.mark.parametrize("shift", [0.5, 3.0])
def test_shifted_steps_end_at_the_same_place(shift: float) -> None:
    """A flow is the same whichever steps are taken along it."""
    found = sample(
        _posterior_mean("rectified_flow"), _noise(), path="rectified_flow", steps=64, method="heun", shift=shift
    )
    assert float((found - (MEAN + STD * _noise())).abs().max()) < 1e-2


@pytest.mark.parametrize("tokens", [8, 20, 32, 60])
def test_shifted_steps_begin_at_pure_noise(tokens: int) -> None:
    """Of a row of any length: beyond 1, by rounding, DPM-Solver++ took the logarithm of a negative number."""
    seen: list[Tensor] = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return x / 2

    shift = (tokens / 1024) ** 0.5
    found = sample(denoise, _noise(), path="rectified_flow", steps=4, method="dpmpp_2m", shift=shift)
    assert bool(found.isfinite().all())
    assert seen[0].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("steps", [0, -1])
def test_no_steps_are_refused(steps: int) -> None:
    """An error, not the noise as a video."""
    with pytest.raises(ConfigError, match=f"at least 1, found {steps}"):
        sample(lambda x, t: x, _noise(), path="rectified_flow", steps=steps)
