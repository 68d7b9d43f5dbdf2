"""What becomes of a task: decided by its history alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from launcher.cluster import RetryConfig
from launcher.retry import (
    Attempt,
    End,
    Start,
    Why,
    bad_nodes,
    combined_exit_code,
    decide_end,
    decide_start,
    is_complete,
)

RETRY = RetryConfig(failures=2, starts_without_progress=3, failures_of_a_node=2, starts=10)


def attempt(step: int | None, why: Why | None, *nodes: str) -> Attempt:
    """A start from `step`, and why it ended, at the fault of some nodes."""
    start = Start(job="1", restart=0, nodes=("node1",), step=step, time=0.0)
    if why is None:
        return Attempt(start, None)
    return Attempt(start, End(why=why, code=1, text="", again=True, at_fault=nodes, time=1.0))


def history(*ends: tuple[int | None, Why | None]) -> list[Attempt]:
    return [attempt(step, why) for step, why in ends]


def test_a_first_start_goes() -> None:
    verdict = decide_start([], step=0, steps=100, stop=False, retry=RETRY)
    assert (verdict.go, verdict.text) == (True, "from the beginning")


@pytest.mark.parametrize(("step", "goes"), [(99, True), (100, False), (101, False), (None, True)])
def test_a_finished_training_is_a_no_op(step: int | None, goes: bool) -> None:
    """Told by its checkpoints; where the store does not answer the rank finds out itself."""
    verdict = decide_start(history((0, "done")), step=step, steps=100, stop=False, retry=RETRY)
    assert (verdict.go, verdict.code) == (goes, 0)


def test_a_finished_command_is_a_no_op() -> None:
    assert not decide_start(history((None, "done")), step=None, steps=None, stop=False, retry=RETRY).go
    assert decide_start(history((None, "failed")), step=None, steps=None, stop=False, retry=RETRY).go
    assert is_complete(history((None, "done"), (None, "unknown")), step=None, steps=None)


def test_a_task_that_was_asked_to_stop_does_not_start() -> None:
    """Its code is that of a run that can be resumed: what depends on it shall not run."""
    verdict = decide_start([], step=5, steps=100, stop=True, retry=RETRY)
    assert (verdict.go, verdict.code) == (False, 75)


@pytest.mark.parametrize("why", ["preempted", "time limit", "signal"])
def test_what_was_told_to_go_goes_on(why: Why) -> None:
    """As often as it gets further."""
    before = history(*((step, why) for step in range(0, 80, 10)))
    verdict = decide_end([*before, attempt(80, None)], code=75, why=why, step=90, retry=RETRY)
    assert (verdict.go, verdict.text) == (True, f"{why}: continues from step 90")


@pytest.mark.parametrize("why", ["preempted", "time limit", "signal", "unknown"])
def test_no_progress_between_restarts_ends_it(why: Why) -> None:
    """Three starts from one step, whatever ended them; two are not enough, and one step further begins anew."""
    two = [attempt(10, why), attempt(10, None)]
    assert decide_end(two, code=75, why=why, step=10, retry=RetryConfig(failures=9, starts_without_progress=3)).go
    three = [attempt(10, why), *two]
    stopped = decide_end(three, code=75, why=why, step=10, retry=RETRY)
    assert (stopped.go, stopped.code) == (False, 75)
    assert "it was started 3 times from step 10 and made no new checkpoint" in stopped.text
    assert decide_end(three, code=75, why="preempted", step=11, retry=RETRY).go
    assert not decide_start(history(*((10, why),) * 3), step=10, steps=100, stop=False, retry=RETRY).go


def test_failures_have_a_budget_that_a_checkpoint_renews() -> None:
    def end(before: Sequence[Attempt], step: int) -> bool:
        return decide_end([*before, attempt(step, None)], code=137, why="failed", step=step, retry=patient).go

    patient = RetryConfig(failures=2, starts_without_progress=100)
    assert end([], 10)
    assert end(history((10, "failed")), 10)
    assert not end(history((10, "failed"), (10, "node lost")), 10)
    assert end(history((10, "failed"), (10, "failed")), 20)


def test_failures_of_a_command_are_counted_in_a_row() -> None:
    """It has no steps to tell progress by: what was preempted in between has not failed."""

    def end(*ends: Why) -> bool:
        before = [attempt(None, why) for why in ends]
        return decide_end([*before, attempt(None, None)], code=1, why="failed", step=None, retry=RETRY).go

    assert end("failed")
    assert not end("failed", "failed")
    assert end("failed", "failed", "preempted")
    assert end(*["preempted"] * 8)


@pytest.mark.parametrize("code", [2, 4, 5, 6])
def test_what_would_be_said_again_is_not_tried_again(code: int) -> None:
    """A wrong config, a checkpoint that is refused, a missing kernel, a training that went wrong."""
    verdict = decide_end([attempt(0, None)], code=code, why="failed", step=0, retry=RETRY)
    assert (verdict.go, verdict.code) == (False, code)


@pytest.mark.parametrize("code", [1, 3, 7, 137, 139])
def test_what_may_pass_is_tried_again(code: int) -> None:
    """Any other error, data that did not come, a hang, a kill, a crash."""
    assert decide_end([attempt(0, None)], code=code, why="failed", step=0, retry=RETRY).go


def test_the_last_fuse() -> None:
    """However well it gets on, nothing is started without an end."""
    many = history(*((step, "preempted") for step in range(10)))
    assert not decide_start(many, step=10, steps=100, stop=False, retry=RETRY).go


@pytest.mark.parametrize(("why", "code"), [("done", 0), ("stopped", 75)])
def test_the_end(why: Why, code: int) -> None:
    verdict = decide_end([attempt(0, None)], code=code, why=why, step=9, retry=RETRY)
    assert (verdict.go, verdict.code) == (False, code)


def test_a_node_that_fails_twice_is_bad() -> None:
    once = [attempt(0, "failed", "node1"), attempt(5, "failed", "node2")]
    assert bad_nodes(once, RETRY) == ()
    assert bad_nodes([*once, attempt(9, "node lost", "node1")], RETRY) == ("node1",)


@pytest.mark.parametrize(
    ("codes", "srun", "expected"),
    [
        ([0, 0], 0, 0),
        ([75, 75], 0, 75),
        ([0, 75], 0, 6),
        ([137, 1], 137, 137),
        ([75, 7], 7, 7),
        ([0, None], 0, 1),
        ([75, None], 143, 143),
        ([None, None], 0, 1),
        ([], 0, 1),
    ],
    ids="done resume mixed first-failure hang lost-word killed-step nothing none".split(),  # noqa: SIM905
)
def test_one_code_for_all_ranks(codes: list[int | None], srun: int, expected: int) -> None:
    """The first rank that failed has the say; a rank that left no word is a failure, also where srun saw none."""
    assert combined_exit_code(codes, srun) == expected
