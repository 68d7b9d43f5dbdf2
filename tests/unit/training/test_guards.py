"""The guards: what they count, when they speak, and that a resumed run counts on."""

from __future__ import annotations

import json
import math
import re

import pytest

from regen_dist.config.run import LatentStdConfig
from regen_dist.distributed.engine import StepResult
from regen_dist.errors import DataError, TrainingError
from regen_dist.training.guards import BadSampleGuard, LatentGuard, NonFiniteGuard


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


def test_counted_at_every_step_no_checkpoint_misses_any() -> None:
    """Checked step by step, a state taken between two log lines goes on to the same counts as the undisturbed run's."""
    steps = [figures(step % 3, 100) for step in range(1, 26)]
    whole, first, resumed = BadSampleGuard(0.5), BadSampleGuard(0.5), BadSampleGuard(0.5)
    for number, step in enumerate(steps):
        whole.check(number, step)
    for number, step in enumerate(steps[:13]):
        first.check(number, step)
    resumed.restore(first.state())
    for number, step in enumerate(steps[13:], 13):
        resumed.check(number, step)
    assert resumed.state() == whole.state() == {"bad": 25, "clips": 2500}


def test_skipped_steps_are_in_the_state() -> None:
    """The count of skipped steps stands in a checkpoint's state among others, as it always did."""
    guard, again = NonFiniteGuard(budget=5), NonFiniteGuard(budget=5)
    guard.check(1, StepResult(False, float("nan")))
    guard.check(2, StepResult(True, 1.0))
    assert guard.state() == {"skipped": 1}
    again.restore({"num_updates": 1, "data": {"seed": 0}, **guard.state()})
    assert again.skipped == 1
    again.restore({})
    assert again.skipped == 0


def latents(content: float, motion: float) -> dict[str, float]:
    return {"loss": 0.5, "latent_std_content": content, "latent_std_motion": motion}


def latent_guard(action: str = "warn", patience: int = 3) -> LatentGuard:
    """Of the range 0.02 to 0.99."""
    return LatentGuard(LatentStdConfig.model_validate({"action": action, "patience": patience}))


@pytest.mark.parametrize(
    ("std", "advice"),
    [
        (0.001, "is 0.001 and was .* learns next to nothing .* optimizer.warmup_steps"),
        (0.995, "is 0.995 and was .* touch its bound: lower optimizer.lr"),
        (math.nan, "is nan and was .* weights or inputs are broken"),
        (math.inf, "is inf and was .* touch its bound"),
    ],
)
def test_a_latent_out_of_range_is_told_of_once(std: float, advice: str) -> None:
    """Too low, too high or not finite at three log lines in a row: one line that names the latent, the value, the
    range and what to try; then silence until it was back in range."""
    guard = latent_guard()
    said = [guard.check(step, latents(0.5, std)) for step in range(1, 11)]
    assert [len(lines) for lines in said] == [0, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    assert re.search(rf"the std of the motion latent {advice}", said[2][0])
    assert "out of range at 3 log lines in a row; guards.latent_std allows 0.02 to 0.99" in said[2][0]
    assert guard.check(11, latents(0.5, 0.5)) == []
    assert [len(guard.check(step, latents(0.5, std))) for step in range(12, 16)] == [0, 0, 1, 0]


def test_latents_are_watched_apart() -> None:
    """Two lines out of range of one latent and two of the other are not three; both at once are two warnings. The
    ends of the range belong to it."""
    guard = latent_guard()
    assert [guard.check(step, latents(0.02, 0.99)) for step in range(5)] == [[]] * 5
    lines = [latents(0.0, 0.5), latents(0.0, 0.5), latents(0.02, 0.0), latents(0.99, 0.0), latents(0.5, 0.02)]
    assert [guard.check(step, line) for step, line in enumerate(lines)] == [[]] * 5
    both = [guard.check(step, latents(0.0, 1.0)) for step in range(5, 8)]
    assert [len(lines) for lines in both] == [0, 0, 2]
    assert [line.split(" is ")[0] for line in both[2]] == [
        "the std of the content latent",
        "the std of the motion latent",
    ]


def test_stop_ends_the_run_and_off_does_nothing() -> None:
    """With stop the third line in a row is an error with the training's code; with off there is nothing at all."""
    stop, off = latent_guard("stop"), latent_guard("off")
    for step in (10, 20):
        assert stop.check(step, latents(0.0, 0.5)) == []
    with pytest.raises(TrainingError, match=r"step 30: the std of the content latent is 0 .*action=warn") as caught:
        stop.check(30, latents(0.0, 0.5))
    assert caught.value.exit_code == 6
    assert [off.check(step, latents(0.0, 0.5)) for step in range(20)] == [[]] * 20
    assert off.state() == {}


def test_other_tasks_are_left_alone() -> None:
    """A task without latents has nothing to watch."""
    guard = latent_guard("stop", patience=1)
    assert guard.check(1, {"loss": 0.0, "grad_norm": math.nan}) == []
    assert guard.state() == {}


def test_a_resumed_run_goes_on_counting_log_lines() -> None:
    """A row goes on over a resume, and what was said before is not said again; a run that is to stop now, stops."""
    guard, again, later, strict = latent_guard(), latent_guard(), latent_guard(), latent_guard("stop")
    for step in (1, 2):
        guard.check(step, latents(0.0, 0.5))
    again.restore(json.loads(json.dumps(guard.state())))
    assert len(again.check(3, latents(0.0, 0.5))) == 1
    state = json.loads(json.dumps(again.state()))
    later.restore(state)
    assert later.check(4, latents(0.0, 0.5)) == []
    strict.restore(state)
    with pytest.raises(TrainingError, match="at 4 log lines in a row"):
        strict.check(4, latents(0.0, 0.5))
