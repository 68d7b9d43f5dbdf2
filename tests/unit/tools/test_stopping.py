"""Long commands that are asked to stop."""

from __future__ import annotations

import signal
import sys
import time

import pytest
import typer

from regen_dist.errors import EXIT_RESUME
from tools.shards.progress import stopping_cleanly


class Struck:
    """A signal reaches this process while it is being deleted."""

    def __init__(self, number: signal.Signals) -> None:
        self.number = number

    def __del__(self) -> None:
        signal.raise_signal(self.number)
        time.sleep(0)


def _be_struck(number: signal.Signals) -> None:
    struck = Struck(number)
    del struck
    time.sleep(60.0)
    pytest.fail("it was not heard")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_a_destructor_swallows_is_heard(number: signal.Signals) -> None:
    """Python ignores what is raised there; a build that ran on to its end would not do as it was asked."""
    before = sys.unraisablehook
    with pytest.raises(typer.Exit) as ended, stopping_cleanly():
        _be_struck(number)
    assert ended.value.exit_code == EXIT_RESUME
    assert sys.unraisablehook is before


def test_what_else_is_lost_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)

    class Broken:
        def __del__(self) -> None:
            raise ValueError

    with stopping_cleanly():
        broken = Broken()
        del broken
    assert [each.exc_type for each in told] == [ValueError]
