"""Samplers: exact where they must be, and of the order that they promise."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from regen_dist.diffusion.path import coefficients
from regen_dist.diffusion.samplers import Denoiser, sample
from regen_dist.errors import ConfigError

PATHS = ("rectified_flow", "cosine_vp")
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
