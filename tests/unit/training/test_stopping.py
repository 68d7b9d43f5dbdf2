"""Stopping and guarding: flags that are set, budgets that are kept."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from regen_dist.distributed.base import StepResult
from regen_dist.distributed.ranks import Ranks
from regen_dist.errors import TrainingError
from regen_dist.training.guards import NonFiniteGuard
from regen_dist.training.stopping import SIGNALS, Stopper


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_sets_the_flag(tmp_path: Path, number: signal.Signals) -> None:
    """A signal does nothing but tell, when asked, that the rank wants to stop and why."""
    with Stopper(tmp_path, Ranks()) as stopper:
        assert not stopper.wanted()
        os.kill(os.getpid(), number)
        assert stopper.wanted()
        assert stopper.reason == number.name


def test_the_first_reason_stays(tmp_path: Path) -> None:
    """An impatient second signal changes nothing."""
    with Stopper(tmp_path, Ranks()) as stopper:
        for number in (signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stopper.wanted()
        assert stopper.reason == "SIGUSR1"


def test_the_handlers_are_given_back(tmp_path: Path) -> None:
    """Afterwards every signal has the handler that it had before, also when the block ends with an error."""
    before = [signal.getsignal(number) for number in SIGNALS]

    def fail() -> None:
        with Stopper(tmp_path, Ranks()):
            assert [signal.getsignal(number) for number in SIGNALS] != before
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_the_file_stop(tmp_path: Path) -> None:
    """A file STOP in the run folder asks rank 0 to stop; the others do not look; the next start removes it."""
    with Stopper(tmp_path, Ranks()) as stopper, Stopper(tmp_path, Ranks(1, 2, 1)) as other:
        assert not stopper.wanted()
        (tmp_path / "STOP").touch()
        assert stopper.wanted()
        assert stopper.reason == "the file STOP"
        assert not other.wanted()
    with Stopper(tmp_path, Ranks(1, 2, 1)):
        assert (tmp_path / "STOP").exists(), "rank 1 leaves it to rank 0"
    with Stopper(tmp_path, Ranks()) as again:
        assert not again.wanted()
        assert not (tmp_path / "STOP").exists()


def test_the_budget_of_bad_steps() -> None:
    """Skipped steps are counted, over resumes too; one more than the budget ends the run with a word on what to do."""
    guard = NonFiniteGuard(budget=2, skipped=1)
    guard.check(5, StepResult(True, 1.0))
    assert guard.skipped == 1
    guard.check(6, StepResult(False, float("nan")))
    assert guard.skipped == 2
    with pytest.raises(
        TrainingError, match=r"step 7: 3 steps had non-finite gradients, .* allows 2\. Lower optimizer\.lr"
    ):
        guard.check(7, StepResult(False, float("inf")))


def test_a_budget_of_zero_allows_none() -> None:
    """The strictest setting stops at the first bad step and at no good one."""
    guard = NonFiniteGuard(budget=0)
    guard.check(1, StepResult(True, 1.0))
    with pytest.raises(TrainingError, match="step 2"):
        guard.check(2, StepResult(False, float("nan")))
