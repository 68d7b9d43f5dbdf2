"""What becomes of a task when it starts and when it ends: pure functions of its history."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from launcher.cluster import RetryConfig
from launcher.history import Attempt, Why
from regen_dist.errors import (
    EXIT_OK,
    EXIT_RESUME,
    BackendError,
    CheckpointError,
    ConfigError,
    RunBusy,
    TrainingError,
)

# What a second start would say again, word for word.
PERMANENT = frozenset(error.exit_code for error in (ConfigError, CheckpointError, BackendError, TrainingError, RunBusy))
_FAILURES: tuple[Why, ...] = ("failed", "node lost", "unknown")


class Verdict(NamedTuple):
    """Whether the task goes on, and why (not); `code` is what the job ends with if not."""

    go: bool
    text: str
    code: int = EXIT_OK


def judge_start(
    history: Sequence[Attempt],
    *,
    step: int | None,
    steps: int | None,
    stop: bool,
    retry: RetryConfig,
    since: float = 0.0,
) -> Verdict:
    """Whether a task that a scheduler has just started should do anything.

    Args:
        history: its earlier starts.
        step: the newest committed one; None when it is not known, or no training.
        steps: that make it complete.
        stop: it was asked to stop for good.
        retry: limits.
        since: when it was submitted, in seconds since the epoch. Tries of earlier submissions do not count: a person
            has looked at them.
    """
    if is_complete(history, step=step, steps=steps):
        return Verdict(False, f"nothing is left to do: all {steps} steps are done" if steps else "it was done before")
    if stop:
        return Verdict(
            False, "it was asked to stop (its folder has a file STOP); `regen jobs resume` goes on", EXIT_RESUME
        )
    return _within_limits(_tries(history, since), step, retry)


def _tries(history: Sequence[Attempt], since: float) -> Sequence[Attempt]:
    return [each for each in history if each.start.time >= since]


def is_complete(history: Sequence[Attempt], *, step: int | None, steps: int | None) -> bool:
    """Whether a task has reached its last step, or has once ended well where it has no steps."""
    if steps is not None:
        return step is not None and step >= steps
    return any(each.end is not None and each.end.why == "done" for each in history)


def judge_end(
    history: Sequence[Attempt], *, code: int, why: Why, step: int | None, retry: RetryConfig, since: float = 0.0
) -> Verdict:
    """What follows when a start has ended.

    Args:
        history: with this start last, and its `end` still None.
        code: the exit code of its ranks together.
        why: it ended.
        step: the newest committed one.
        retry: limits.
        since: as of `judge_start`.
    """
    history = _tries(history, since)
    if why in ("done", "stopped"):
        return Verdict(False, why, code)
    if code in PERMANENT:
        return Verdict(False, f"exit code {code} would come again: see its log, mend it, `regen jobs resume`", code)
    limits = _within_limits(history, step, retry)
    if not limits.go:
        return limits._replace(code=code)
    failures = _failures_in_a_row(history[:-1], step) + 1
    if why in _FAILURES and failures > retry.failures:
        told = f"it failed {failures} times without a new checkpoint between (retry.failures: {retry.failures})"
        return Verdict(False, told, code)
    return Verdict(True, f"{why}: it goes on from {_place(step)}")


def _within_limits(history: Sequence[Attempt], step: int | None, retry: RetryConfig) -> Verdict:
    if len(history) >= retry.starts:
        return Verdict(False, f"it was started {len(history)} times (retry.starts: {retry.starts})", EXIT_RESUME)
    stuck = _starts_without_progress(history, step)
    if stuck >= retry.starts_without_progress:
        return Verdict(
            False,
            f"it was started {stuck} times from {_place(step)} and made no new checkpoint (retry."
            f"starts_without_progress: {retry.starts_without_progress}); see its logs, or save more often",
            EXIT_RESUME,
        )
    return Verdict(True, f"from {_place(step)}")


def _starts_without_progress(history: Sequence[Attempt], step: int | None) -> int:
    """How many of the newest starts began where it stands now; unknown where there are no steps to tell by."""
    count = 0
    for attempt in reversed(history):
        if step is None or attempt.start.step != step:
            break
        count += 1
    return count


def _failures_in_a_row(history: Sequence[Attempt], step: int | None) -> int:
    """Failures since the newest checkpoint, or since the last start that did not fail where there are no steps."""
    count = 0
    for attempt in reversed(history):
        if step is not None and attempt.start.step != step:
            break
        failed = attempt.end is None or attempt.end.why in _FAILURES
        if step is None and not failed:
            break
        count += failed
    return count


def bad_nodes(history: Sequence[Attempt], retry: RetryConfig) -> tuple[str, ...]:
    """Nodes on which this task has failed too often."""
    failures = Counter(node for each in history if each.end for node in each.end.at_fault)
    return tuple(sorted(node for node, count in failures.items() if count >= retry.failures_of_a_node))


def overall_code(codes: Sequence[int | None], srun: int) -> int:
    """One exit code for the ranks of a start.

    Args:
        codes: of each rank, in the order in which they ended; None for one that left no word.
        srun: of the program that started them: 0 unless a rank failed or was lost.
    """
    failed = [code for code in codes if code not in (None, EXIT_OK, EXIT_RESUME)]
    if failed:
        return failed[0] or 1
    if srun or None in codes or not codes:
        return srun or 1
    return codes[0] or EXIT_OK if len(set(codes)) == 1 else TrainingError.exit_code


def _place(step: int | None) -> str:
    return "the beginning" if not step else f"step {step}"
