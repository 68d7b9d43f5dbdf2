"""The guards: counts, moments of speaking, loss spikes, and equal decisions after a resume."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from regen_dist.config import load_config
from regen_dist.config.run import LatentStdConfig, SpikeConfig
from regen_dist.distributed.engine import StepResult
from regen_dist.errors import DataError, TrainingError
from regen_dist.training.guards import (
    BadSampleGuard,
    Guards,
    LatentGuard,
    NonFiniteGuard,
    Spike,
    SpikeGuard,
    running_median,
)

ROOT = Path(__file__).parents[3]


def figures(bad: float, clips: float = 100) -> dict[str, float]:
    return {"bad_samples": bad, "clips": clips}


@pytest.mark.parametrize(
    ("share", "steps", "then", "error"),
    [
        (0.0, [figures(0)], figures(1), r"1 of 200 samples could not be read, data\.max_bad_share allows 0\."),
        (0.01, [figures(10, 10)], figures(1, 10), "11 of 20 "),  # at first as many as of a thousand
        (0.01, [figures(1)] * 100, figures(2), r"102 of 10100 .* allows 0\.01"),
    ],
    ids=["none", "at first", "of the whole run"],
)
def test_bad_samples_are_borne_up_to_their_share(
    share: float, steps: list[dict[str, float]], then: dict[str, float], error: str
) -> None:
    guard = BadSampleGuard(share)
    for step, seen in enumerate(steps):
        guard.check(step, seen)
    with pytest.raises(DataError, match=f"step {len(steps)}: {error}"):
        guard.check(len(steps), then)


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


@pytest.mark.parametrize(("path", "warned"), [("bench/frozen_tiny", False), ("embedder/nano", True)])
def test_a_frozen_encoder_has_latents_of_any_spread(path: str, warned: bool) -> None:
    """They are normalised to a std of 1, and nothing about them is trained."""
    guard = Guards(load_config(ROOT / "configs" / f"{path}.yaml")).latents
    assert any(guard.check(step, {"latent_std_content": 1.05}) for step in range(10)) == warned


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


# Loss spikes: what is one, what is none, and that a resumed run decides as the undisturbed one.


CLIP, IMAGE = "17x64x64", "1x64x64"


def guard_of(**changes: Any) -> SpikeGuard:
    """A guard with a short window: 16 losses, judged from 8 on, 3 suspicious steps are a spike."""
    return SpikeGuard(SpikeConfig.model_validate({"window": 16, "least": 8, **changes}))


def judged(guard: SpikeGuard, losses: Iterable[float], first_step: int = 1, kind: str = "") -> list[Spike]:
    """The spikes among losses of consecutive steps."""
    found = [guard.judge(step, loss, kind) for step, loss in enumerate(losses, first_step)]
    return [spike for spike in found if spike is not None]


def noisy(level: float, count: int, seed: int = 0) -> list[float]:
    """Losses of a run that makes no progress: a level with a noise of 5 %."""
    source = random.Random(seed)
    return [level * (1 + 0.05 * source.gauss(0, 1)) for _ in range(count)]


def through_json(state: dict[str, Any]) -> dict[str, Any]:
    """A state as it comes back from a manifest."""
    return dict(json.loads(json.dumps(state)))


def test_three_in_a_row_are_a_spike_that_names_its_first_step() -> None:
    """The spike tells from which step on to distrust the run, and what the last loss was compared with."""
    guard = guard_of()
    assert judged(guard, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]) == []
    # median 5, deviations 4 3 2 1 0 1 2 3 4: their median is 2
    (spike,) = judged(guard, [40.0, 50.0, 60.0], 10)
    assert spike == Spike(10, 12, 60.0, 5.0, 5.0 + 10 * (1.4826 * 2.0))
    assert str(spike) == (
        "loss spike in steps 10 to 12: the loss is 60, the median before was 5, and up to 34.652 is usual"
    )


def test_one_or_two_outliers_are_no_spike_and_do_not_enter_the_window() -> None:
    """A hard batch passes, as often as it comes, and does not make the next one look usual."""
    guard = guard_of()
    losses = noisy(0.5, 200)
    for step in range(20, 200, 10):
        losses[step] = losses[step + 1] = 5.0
    assert judged(guard, losses) == []
    assert 5.0 not in guard.state()["windows"][""]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_neither_enters_nor_counts(value: float) -> None:
    """A NaN in the window would make every comparison false and the guard blind: with NaN or infinity at every fifth
    step, windows hold the finite losses alone, no good step is suspicious, and the spike is found at its step."""
    guard, reference = guard_of(), guard_of()
    losses = noisy(0.5, 100)
    for index, loss in enumerate(losses):
        assert guard.judge(2 * index + 1, loss) is None
        assert reference.judge(2 * index + 1, loss) is None
        if index % 5 == 0:
            assert guard.judge(2 * index + 2, value) is None
    assert guard.state() == reference.state()
    assert guard.state()["row"] == []
    (spike,) = judged(guard, [3.0, value, 4.0, value, value, 5.0], 201)
    assert (spike.first_step, spike.last_step) == (201, 206), "a row is neither ended nor lengthened by such a step"


def test_nothing_but_nan_is_no_spike() -> None:
    """The non-finite guard has its own budget; this one stays out of it and keeps its window."""
    guard = guard_of()
    judged(guard, noisy(0.5, 16))
    before = guard.state()
    assert judged(guard, [math.nan] * 500, 17) == []
    assert guard.state() == before


def test_nothing_is_judged_before_there_is_something_to_compare_with() -> None:
    """The wild first steps of a run set no alarm; from the first step after `least` on, every step is judged."""
    guard = guard_of(least=8, patience=1)
    assert judged(guard, [100.0, 0.1, 5.0, 70.0, 0.2, 0.1, 9.0, 900.0]) == []
    guard = guard_of(least=8, patience=1)
    assert judged(guard, [0.5] * 7 + [50.0]) == []
    assert [spike.last_step for spike in judged(guard, [50.0], 9)] == [9]


@pytest.mark.parametrize("growth", [1.001, 1.01, 1.03])
def test_a_slow_drift_upward_is_no_spike(growth: float) -> None:
    """A loss that creeps up a few percent a step, to many times its start, takes its window along."""
    losses = [loss * growth**step for step, loss in enumerate(noisy(0.5, 1000))]
    assert losses[-1] > 2.5 * losses[0]
    assert judged(SpikeGuard(SpikeConfig(patience=1)), losses) == []


def test_noise_and_progress_are_no_spike() -> None:
    """Ten thousand steps of a loss that falls a hundredfold, with a noise of 5 %: not one suspicious step."""
    losses = [loss * (0.01 + 0.99 * math.exp(-step / 300)) for step, loss in enumerate(noisy(1.0, 10_000))]
    assert judged(SpikeGuard(SpikeConfig(patience=1)), losses) == []


@pytest.mark.parametrize("level", [0.5, -0.5])
def test_a_flat_window_does_not_make_noise_suspicious(level: float) -> None:
    """Where all losses are equal (MAD 0), ten percent above is the limit; beyond it is still a spike."""
    guard = guard_of(patience=1)
    assert judged(guard, [level] * 16) == []
    assert running_median([level] * 16, 10.0) == (level, pytest.approx(level + 0.05))
    assert judged(guard, [level + 0.049, level + 0.03, level], 17) == []
    assert [spike.last_step for spike in judged(guard, [level + 0.06], 20)] == [20]


def test_kinds_of_batches_are_compared_with_their_own() -> None:
    """Images with ten times the loss of clips are no spike, and a clip with the loss of an image is suspicious."""
    guard = guard_of(patience=1)
    clips, images = noisy(0.1, 100, seed=1), noisy(1.0, 100, seed=2)
    for index, (clip, image) in enumerate(zip(clips, images, strict=True)):
        assert guard.judge(2 * index + 1, clip, CLIP) is None
        assert guard.judge(2 * index + 2, image, IMAGE) is None
    assert guard.judge(201, 1.0, IMAGE) is None
    assert guard.judge(202, 1.0, CLIP) is not None


def test_a_row_goes_on_over_kinds() -> None:
    """When the weights are broken every kind suffers: one suspicious step of each kind makes a row."""
    guard = guard_of()
    judged(guard, [0.1] * 16, kind=CLIP)
    judged(guard, [1.0] * 16, 17, kind=IMAGE)
    assert guard.judge(33, 10.0, IMAGE) is None
    assert guard.judge(34, 9.0, CLIP) is None
    assert guard.judge(35, 8.0, "17x32x32") is None, "a kind that is new is not judged and ends no row"
    assert guard.judge(36, 7.0, IMAGE) == Spike(33, 36, 7.0, 1.0, 1.1)


def test_a_warning_comes_once_for_a_lasting_change() -> None:
    """The level triples for good: one warning, then the new level is the usual one, and a spike above it is found."""
    guard = guard_of(action="warn")
    assert judged(guard, noisy(0.5, 100)) == []
    (spike,) = judged(guard, noisy(1.5, 1000), 101)
    assert (spike.first_step, spike.last_step) == (101, 103)
    assert [spike.first_step for spike in judged(guard, [9.0] * 3, 1101)] == [1101]


def test_without_going_back_a_spike_comes_again() -> None:
    """With action rollback the window is kept for the run to be measured by: the next three steps are a spike too."""
    guard = guard_of(action="rollback")
    judged(guard, [0.5] * 16)
    assert [spike.first_step for spike in judged(guard, [5.0] * 7, 17)] == [17, 20]
    assert guard.state()["windows"] == {"": [0.5] * 16}


def test_off_is_off() -> None:
    """Nothing is found and nothing kept, also of a checkpoint that was saved before it was turned off."""
    guard, before = guard_of(action="off"), guard_of()
    judged(before, [0.5] * 16)
    guard.restore(before.state())
    assert judged(guard, [0.5] * 16 + [50.0] * 10) == []
    assert guard.state() == {"windows": {}, "row": [], "rollbacks": 0}


def _long_sequence(source: random.Random) -> list[tuple[float, str]]:
    """At least 3000 steps of two kinds with outliers, bursts, changes of level, NaN and losses near the limit."""
    level, steps = {CLIP: 0.1, IMAGE: 1.0}, []
    while len(steps) < 3000:
        factor = source.choice([1.0] * 12 + [1.5, 2.5, 10.0, math.nan, math.inf])
        if source.random() < 0.02:
            level = {kind: value * source.uniform(0.5, 3.0) for kind, value in level.items()}
        for _ in range(source.randint(1, 5)):
            kind = source.choice([CLIP, CLIP, IMAGE])
            steps.append((level[kind] * factor * (1 + 0.05 * source.gauss(0, 1)), kind))
    return steps


@pytest.mark.parametrize("action", ["warn", "rollback"])
@pytest.mark.parametrize("seed", range(4))
def test_a_resumed_run_decides_as_the_undisturbed_one(action: str, seed: int) -> None:
    """Saved as JSON and restored into a new guard at every tenth step or so, 3000 decisions and the last state are
    the same, bit for bit."""
    source = random.Random(seed)
    undisturbed, resumed = guard_of(action=action), guard_of(action=action)
    found, resumes = 0, 0
    for step, (loss, kind) in enumerate(_long_sequence(source), 1):
        if source.random() < 0.1:
            state, resumed = through_json(resumed.state()), guard_of(action=action)
            resumed.restore(state)
            resumes += 1
        expected = undisturbed.judge(step, loss, kind)
        assert resumed.judge(step, loss, kind) == expected, step
        found += expected is not None
    assert resumed.state() == undisturbed.state()
    assert found > 5
    assert resumes > 200


def test_a_state_without_the_row_decides_otherwise() -> None:
    """Negative control: a checkpoint in the middle of a row must keep the row, or the spike comes later."""
    guard, complete, cut = guard_of(), guard_of(), guard_of()
    judged(guard, [0.5] * 16 + [5.0] * 2)
    complete.restore(through_json(guard.state()))
    cut.restore(through_json(guard.state()) | {"row": []})
    assert complete.judge(19, 5.0) is not None
    assert cut.judge(19, 5.0) is None


def test_a_window_that_was_made_shorter_keeps_the_newest() -> None:
    """A resumed run may have another window: of the losses in the checkpoint the newest stay."""
    long, short = guard_of(window=16), guard_of(window=8)
    judged(long, [float(step) for step in range(1, 17)])
    short.restore(through_json(long.state()))
    assert short.state()["windows"] == {"": [9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0, 16.0]}


def test_a_checkpoint_of_before_there_was_a_guard() -> None:
    """An empty state is a fresh start."""
    guard = guard_of()
    judged(guard, noisy(0.5, 20))
    guard.restore({})
    assert guard.state() == guard_of().state()


def go_back(guard: SpikeGuard, kept: dict[str, Any]) -> None:
    """What a rollback does to the guard: the checkpoint's state with one more rollback than this run knows of."""
    guard.restore(through_json(kept | {"rollbacks": guard.rollbacks + 1}))


def test_after_going_back_the_same_is_found_again() -> None:
    """With the checkpoint's window the next spike is found at its step, as often as it comes; the rollbacks are
    counted on, though the checkpoint knows of none."""
    guard = guard_of(action="rollback")
    judged(guard, [0.5] * 10)
    kept = guard.state()
    for count in (1, 2, 3):
        (spike,) = judged(guard, [0.52] * 5 + [5.0] * 3, 11)
        assert (spike.first_step, spike.last_step) == (16, 18)
        go_back(guard, kept)
        assert guard.state() == kept | {"rollbacks": count}
