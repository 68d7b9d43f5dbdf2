"""The learning rate is a function of the step."""

from __future__ import annotations

import itertools

import pytest

from regen_dist.config.run import OptimizerConfig
from regen_dist.training.metrics import learning_rate

CONFIG = OptimizerConfig(lr=1.0, warmup_steps=4, min_lr_ratio=0.1)


def test_warmup_is_linear_and_starts_above_zero() -> None:
    """The first step already learns; the last step of the warm-up reaches the full rate."""
    assert [learning_rate(CONFIG, step, 100) for step in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_cosine_from_the_rate_to_its_floor() -> None:
    """Full right after the warm-up, half way between rate and floor in the middle, the floor at the end and after."""
    rates = [learning_rate(CONFIG, step, 104) for step in range(4, 120)]
    assert rates[0] == pytest.approx(1.0)
    assert rates[50] == pytest.approx(0.55)
    assert rates[100:] == pytest.approx([0.1] * 16)
    assert all(after <= before for before, after in itertools.pairwise(rates))


@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 5), (5, 5), (9, 5)])
def test_odd_lengths(warmup: int, total: int) -> None:
    """No warm-up, a warm-up as long as the run or longer: a finite rate within its limits at every step."""
    config = CONFIG.model_copy(update={"warmup_steps": warmup})
    assert all(0 < learning_rate(config, step, total) <= 1.0 for step in range(total))
