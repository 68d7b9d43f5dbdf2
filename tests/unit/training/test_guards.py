from __future__ import annotations

import pytest

from regen_dist.errors import DataError
from regen_dist.training.guards import BadSampleGuard


def figures(bad: float, clips: float = 100) -> dict[str, float]:
    return {"bad_samples": bad, "clips": clips}


def test_not_one_is_borne_where_the_share_is_zero() -> None:
    guard = BadSampleGuard(0.0)
    guard.check(1, figures(0))
    with pytest.raises(DataError, match=r"step 2: 1 of 200 samples could not be read, data\.max_bad_share allows 0\."):
        guard.check(2, figures(1))


def test_at_first_as_many_are_borne_as_of_a_thousand() -> None:
    guard = BadSampleGuard(0.01)
    guard.check(1, figures(10, 10))
    with pytest.raises(DataError, match="step 2: 11 of 20 "):
        guard.check(2, figures(1, 10))


def test_the_share_is_of_the_whole_run() -> None:
    guard = BadSampleGuard(0.01)
    for step in range(100):
        guard.check(step, figures(1))
    with pytest.raises(DataError, match=r"step 100: 102 of 10100 .* allows 0\.01"):
        guard.check(100, figures(2))


def test_everything_may_be_bad_where_that_is_asked_for() -> None:
    guard = BadSampleGuard(1.0)
    guard.check(1, figures(5000, 5000))


def test_a_resumed_run_goes_on_counting() -> None:
    guard = BadSampleGuard(0.01)
    guard.check(1, figures(10))
    again = BadSampleGuard(0.01)
    again.restore(guard.state())
    assert (again.bad, again.clips) == (10, 100)
    with pytest.raises(DataError):
        again.check(2, figures(1))
    old = BadSampleGuard(0.01)
    old.restore({})  # a checkpoint of before there were guards
    assert (old.bad, old.clips) == (0, 0)
