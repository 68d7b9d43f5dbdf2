"""How a task stands: every state, from made-up histories and answers of a scheduler."""

from __future__ import annotations

import time

import pytest

from launcher.attempts import Attempt, End, Start, Why
from launcher.jobs.find import JobState, QueueState, derive_state


def start() -> Attempt:
    return Attempt(Start(job="12", restart=0, nodes=("node1",), step=0, time=1.0), None)


NOW = time.time()  # for all tests alike: they run long after they were collected


def over(why: Why, *, again: bool = False, ago_s: float = 1000.0, text: str = "the reason", code: int = 75) -> Attempt:
    end = End(why=why, code=code, text=text, again=again, time=NOW - ago_s)
    return start()._replace(end=end)


RUNNING, PENDING = QueueState("RUNNING"), QueueState("PENDING", "Priority")
GONE, CANCELLED, FAILED = QueueState(), QueueState("CANCELLED"), QueueState("FAILED", "NonZeroExitCode")


@pytest.mark.parametrize(
    ("history", "told", "expected"),
    [
        pytest.param([], PENDING, JobState("pending", "Priority"), id="waits"),
        pytest.param([], QueueState("PENDING", "None"), JobState("pending"), id="waits, no reason yet"),
        pytest.param([], RUNNING, JobState("running", "it is starting"), id="before its first word"),
        pytest.param([start()], RUNNING, JobState("running"), id="runs"),
        pytest.param([start()], QueueState("SUSPENDED"), JobState("running", "suspended by Slurm"), id="suspended"),
        pytest.param([start()], QueueState("POWER_UP_NODE"), JobState("running"), id="a state that is not known"),
        pytest.param([over("preempted", again=True)], PENDING, JobState("requeued", "preempted; Priority"), id="again"),
        pytest.param([start()], PENDING, JobState("requeued", "it was cut off; Priority"), id="after a power cut"),
        pytest.param(
            [over("time limit", again=True)], QueueState("COMPLETING"), JobState("requeued", "time limit"), id="CG"
        ),
        pytest.param(
            [over("signal", again=True, ago_s=1)], QueueState("COMPLETED"), JobState("requeued", "signal"), id="moment"
        ),
        pytest.param([over("preempted", again=True), start()], RUNNING, JobState("running"), id="runs again"),
        pytest.param([over("done")], GONE, JobState("done"), id="done"),
        pytest.param([over("done")], RUNNING, JobState("done"), id="done, its job not yet"),
        pytest.param([over("stopped")], FAILED, JobState("stopped"), id="stopped"),
        pytest.param([over("stopped", code=137)], GONE, JobState("stopped"), id="stopped without saving"),
        pytest.param([over("stopped", code=1)], GONE, JobState("stopped"), id="a program of somebody else"),
        pytest.param(
            [over("stopped", code=4)], GONE,
            JobState("failed", "asked to stop, it could not save: see its log"), id="could not save",
        ),
        pytest.param(
            [over("stopped", code=3)], GONE,
            JobState("failed", "asked to stop, it could not save: see its log"), id="its store did not answer",
        ),
        pytest.param([over("failed")], FAILED, JobState("failed", "the reason"), id="failed"),
        pytest.param([over("preempted")], GONE, JobState("failed", "the reason"), id="gets nowhere"),
        pytest.param(
            [over("preempted", again=True)], GONE,
            JobState("lost", "preempted, and then it was not started again"), id="requeue failed",
        ),
        pytest.param(
            [start()], QueueState("NODE_FAIL"),
            JobState("lost", "it was cut off (Slurm: NODE_FAIL), and neither runs nor waits"), id="lost its node",
        ),
        pytest.param([], GONE, JobState("lost", "it never began, and neither runs nor waits"), id="never began"),
        pytest.param([], CANCELLED, JobState("stopped", "cancelled in the queue of Slurm"), id="scancel"),
    ],
)  # fmt: skip
def test_states(history: list[Attempt], told: QueueState, expected: JobState, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.jobs.find.time.time", lambda: NOW)
    assert derive_state(history, told, stop=False, complete=False) == expected


@pytest.mark.parametrize("code", [3, 4])
def test_a_command_that_is_stopped_may_end_with_any_code(code: int) -> None:
    assert derive_state([over("stopped", code=code)], GONE, stop=False, complete=False, trains=False).state == "stopped"


def test_a_job_that_ends_before_it_begins_has_failed() -> None:
    found = derive_state([], FAILED, stop=False, complete=False)
    assert found.state == "failed"
    assert "--launcher" in found.note


@pytest.mark.parametrize(
    ("history", "told", "state"),
    [
        pytest.param([start()], RUNNING, "stopping", id="runs"),
        pytest.param([start()], GONE, "stopped", id="was killed"),
        pytest.param([], CANCELLED, "stopped", id="waited"),
        pytest.param(
            [over("preempted", again=True, ago_s=1)], QueueState("COMPLETED"), "stopped", id="was to be requeued"
        ),
        pytest.param([over("done")], GONE, "done", id="was done before"),
    ],
)
def test_with_a_file_that_asks_it_to_stop(history: list[Attempt], told: QueueState, state: str) -> None:
    assert derive_state(history, told, stop=True, complete=False).state == state


def test_a_complete_run_that_was_submitted_again_is_done() -> None:
    assert derive_state([], QueueState("COMPLETED"), stop=False, complete=True) == JobState("done")


@pytest.mark.parametrize(
    ("history", "stop", "state"),
    [
        ([], False, "pending"),
        ([start()], False, "running"),
        ([start()], True, "stopping"),
        ([over("preempted", again=True)], False, "requeued"),
        ([over("failed")], False, "failed"),
    ],
)
def test_where_the_scheduler_is_silent_the_history_tells(history: list[Attempt], stop: bool, state: str) -> None:
    assert derive_state(history, None, stop=stop, complete=False).state == state
