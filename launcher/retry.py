"""Start and end decisions for every attempt of a task, called by its batch script:

    python -m launcher.retry begin FOLDER      0: start; 100: nothing to do; otherwise: end with this code
    python -m launcher.retry end FOLDER CODE   requeue the job, or end with the exit code of its ranks

One process decides for all ranks. `launcher.task` calls the same functions on this machine. It runs before any rank
and imports no torch.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from launcher import slurm
from launcher.attempts import (
    Attempt,
    End,
    RankExit,
    Start,
    Why,
    attempts_since,
    hung_hosts,
    now,
    prune_rank_exits,
    read_history,
    read_rank_exits,
    write_entry,
)
from launcher.cluster import RetryConfig
from launcher.job import JobTask, Submission, TaskProgress, read_job
from regen_dist.checkpoint.manifest import parse_manifest
from regen_dist.data.storage.store import Store
from regen_dist.errors import (
    EXIT_OK,
    EXIT_RESUME,
    BackendError,
    CheckpointError,
    ConfigError,
    DataError,
    HangError,
    ObjectMissing,
    RegenError,
    RunBusy,
    TrainingError,
)
from regen_dist.observe.terminal import shield_streams

# Schedulers: the queries that an attempt makes, on Slurm and on this machine.

_LATE_S = 120.0  # Slurm signals up to a minute before the requested time
_EARLY_S = 10.0  # this process started slightly after its time limit began
_STARTED = time.monotonic()  # start of this process, approximately
Answer = TypeVar("Answer")


class Scheduler(Protocol):
    """Scheduler queries of an attempt."""

    job: str
    restart: int
    nodes: tuple[str, ...]

    def was_cancelled(self) -> bool:
        """Return whether somebody has cancelled the job."""

    def stop_reason(self, job: Submission) -> Why:
        """Return why ranks that ended cleanly, with everything saved, were signalled."""

    def down_nodes(self, nodes: Sequence[str]) -> tuple[str, ...]:
        """Return the nodes among `nodes` that are down."""

    def excludable(self, job: Submission, nodes: Sequence[str]) -> tuple[str, ...]:
        """Return the nodes among `nodes` that can be excluded from the job."""


@dataclass
class SlurmScheduler:
    """The Slurm job that this process belongs to. A controller that does not answer is asked again for a while."""

    job: str = field(default_factory=lambda: os.environ["SLURM_JOB_ID"])
    restart: int = field(default_factory=lambda: int(os.environ.get("SLURM_RESTART_COUNT", "0")))
    nodes: tuple[str, ...] = field(default_factory=lambda: slurm.expand(os.environ.get("SLURM_JOB_NODELIST", "")))

    @property
    def name(self) -> str:
        """The controller's name of this task alone. The last task of an array has the array's number as its job id,
        and that names all of its tasks."""
        array = os.environ.get("SLURM_ARRAY_JOB_ID")
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else self.job

    @cached_property
    def _facts(self) -> dict[str, str]:
        """The controller's fields of the job at its end; none if it does not answer."""
        return _answer(lambda: slurm.show_job(self.name), {})

    def was_cancelled(self) -> bool:
        """Return whether somebody has cancelled the job, which then may not be requeued. The controller calls it
        COMPLETING while its processes end; after a preemption or a lost node it has requeued the job itself."""
        facts = self._facts
        ends = facts.get("JobState") in ("COMPLETING", "CANCELLED") and facts.get("Reason") != "TimeLimit"
        requeued = facts.get("Restarts", str(self.restart)) != str(self.restart)
        return ends and not requeued and slurm.seconds_until(facts.get("PreemptTime")) is None

    def stop_reason(self, job: Submission) -> Why:
        """Ask the controller for a preemption and compare the time limit; otherwise a user sent the signal."""
        if slurm.seconds_until(self._facts.get("PreemptTime")) is not None:
            return "preempted"
        left_s = slurm.seconds_until(self._facts.get("EndTime"))
        near = left_s is not None and left_s <= job.cluster.signal_lead_s + _LATE_S
        return "time limit" if near else "signal"

    def down_nodes(self, nodes: Sequence[str]) -> tuple[str, ...]:
        """Ask the controller; none if it does not answer."""
        return _answer(lambda: slurm.lost_nodes(nodes), ())

    def excludable(self, job: Submission, nodes: Sequence[str]) -> tuple[str, ...]:
        """Return all, or none if Slurm could not start the job without them, or does not answer."""
        if not nodes:
            return ()
        from launcher.script import batch_script  # which imports submitit

        without = job.cluster.model_copy(update={"exclude": (*job.cluster.exclude, *nodes)})
        script = batch_script(job.model_copy(update={"cluster": without}))
        return () if _answer(lambda: slurm.refusal(script), "Slurm does not answer") else tuple(nodes)


def _answer(question: Callable[[], Answer], otherwise: Answer) -> Answer:
    """Return the controller's answer; `otherwise`, with a warning, if it gives none for some minutes."""
    try:
        return slurm.ask_patiently(question)
    except BackendError as error:
        log_line(f"warning: {error}")
        return otherwise


class LocalScheduler:
    """Scheduler of this machine; `restart` counts the starts of the task."""

    def __init__(self, task: JobTask) -> None:
        self.job = os.environ.get("SUBMITIT_LOCAL_JOB_ID", str(os.getpid()))
        self.restart = len(read_history(task.launch))
        self.nodes: tuple[str, ...] = (socket.gethostname(),)
        self.timed_out = False

    def was_cancelled(self) -> bool:
        """Nothing cancels a task of this machine but `regen jobs stop`, which leaves a STOP file."""
        return False

    def stop_reason(self, job: Submission) -> Why:
        """Compare the time limit, which began with this process. Any other signal is a user's request to stop: no one
        else preempts jobs on this machine."""
        limit_s = None if job.cluster.time_min is None else job.cluster.time_min * 60 - job.cluster.signal_lead_s
        self.timed_out = limit_s is not None and time.monotonic() - _STARTED >= limit_s - _EARLY_S
        return "time limit" if self.timed_out else "stopped"

    def down_nodes(self, nodes: Sequence[str]) -> tuple[str, ...]:
        """Return none: the only node is this machine."""
        return ()

    def excludable(self, job: Submission, nodes: Sequence[str]) -> tuple[str, ...]:
        """Return none: there is no other node."""
        return ()


# Restart policy: pure functions of a task's history.

# Errors that a restart would repeat.
PERMANENT = frozenset(error.exit_code for error in (ConfigError, CheckpointError, BackendError, TrainingError, RunBusy))
_FAILURES: tuple[Why, ...] = ("failed", "node lost", "unknown")
_AT_ONCE_S = 60.0  # data that is not there fails within this time; a store that does not answer takes longer


class RetryDecision(NamedTuple):
    """Decision to continue or not, with its reason; `code` is the job's exit code if not."""

    go: bool
    text: str
    code: int = EXIT_OK


def decide_start(
    history: Sequence[Attempt],
    *,
    step: int | None,
    steps: int | None,
    stop: bool,
    retry: RetryConfig,
    since: float = 0.0,
) -> RetryDecision:
    """Decide whether a task that a scheduler has just started should run.

    Args:
        history: earlier attempts.
        step: newest committed step; None if unknown or not training.
        steps: number of steps that completes the task.
        stop: a stop was requested (file STOP).
        retry: limits.
        since: time of submission in seconds since the epoch. Attempts of earlier submissions do not count: a person has
            resubmitted since.
    """
    if is_complete(history, step=step, steps=steps):
        text = f"nothing is left to do: all {steps} steps are done" if steps else "already completed"
        return RetryDecision(False, text)
    if stop:
        return RetryDecision(
            False, "a stop was requested (file STOP in its folder); `regen jobs resume` continues", EXIT_RESUME
        )
    return _within_limits(attempts_since(history, since), step, retry)


def is_complete(history: Sequence[Attempt], *, step: int | None, steps: int | None) -> bool:
    """Return whether a task has reached its last step or, without steps, has ever succeeded."""
    if steps is not None:
        return step is not None and step >= steps
    return any(each.end is not None and each.end.why == "done" for each in history)


def decide_end(
    history: Sequence[Attempt], *, code: int, why: Why, step: int | None, retry: RetryConfig, since: float = 0.0
) -> RetryDecision:
    """Decide what follows the end of an attempt.

    Args:
        history: attempts, the last one with `end` still None.
        code: combined exit code of its ranks.
        why: reason for its end.
        step: newest committed step.
        retry: limits.
        since: see `decide_start`.
    """
    history = attempts_since(history, since)
    if why in ("done", "stopped"):
        return RetryDecision(False, why, code)
    if code in PERMANENT:
        return RetryDecision(
            False, f"exit code {code} would occur again: see its log, fix the cause, `regen jobs resume`", code
        )
    if code == DataError.exit_code and _failed_at_once(history[:-1], code, step):
        text = f"exit code {code} came twice, the first time at once: see its log, fix the cause, `regen jobs resume`"
        return RetryDecision(False, text, code)
    limits = _within_limits(history, step, retry)
    if not limits.go:
        return limits._replace(code=code)
    failures = _failures_in_a_row(history[:-1], step) + 1
    if why in _FAILURES and failures > retry.failures:
        reason = f"it failed {failures} times without a new checkpoint in between (retry.failures: {retry.failures})"
        return RetryDecision(False, reason, code)
    return RetryDecision(True, f"{why}: continues from {_resume_point(step)}")


def _failed_at_once(history: Sequence[Attempt], code: int, step: int | None) -> bool:
    """Return whether the newest attempt failed with this code soon after its start, and no checkpoint came since."""
    start, end = history[-1] if history else (None, None)
    return bool(start and end and (end.code, start.step) == (code, step) and end.time - start.time < _AT_ONCE_S)


def _within_limits(history: Sequence[Attempt], step: int | None, retry: RetryConfig) -> RetryDecision:
    if len(history) >= retry.starts:
        return RetryDecision(False, f"it was started {len(history)} times (retry.starts: {retry.starts})", EXIT_RESUME)
    stuck = _starts_without_progress(history, step)
    if stuck >= retry.starts_without_progress:
        return RetryDecision(
            False,
            f"it was started {stuck} times from {_resume_point(step)} and made no new checkpoint (retry."
            f"starts_without_progress: {retry.starts_without_progress}); see its logs, or save more often",
            EXIT_RESUME,
        )
    return RetryDecision(True, f"from {_resume_point(step)}")


def _starts_without_progress(history: Sequence[Attempt], step: int | None) -> int:
    """Count the newest starts that began at the current step; 0 if there are no steps."""
    return sum(1 for _ in takewhile(lambda each: each.start.step == step is not None, reversed(history)))


def _failures_in_a_row(history: Sequence[Attempt], step: int | None) -> int:
    """Count failures since the newest checkpoint or, without steps, since the last start that did not fail."""
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
    """Return the nodes on which this task has failed too often."""
    failures = Counter(node for each in history if each.end for node in each.end.at_fault)
    return tuple(sorted(node for node, count in failures.items() if count >= retry.failures_of_a_node))


def combined_exit_code(codes: Sequence[int | None], srun: int) -> int:
    """Combine the exit codes of a start's ranks.

    Args:
        codes: exit codes of the ranks in order of their end; None for a rank without an exit file.
        srun: exit code of the program that started them: 0 unless a rank failed or was lost.
    """
    failed = [code for code in codes if code not in (None, EXIT_OK, EXIT_RESUME)]
    if failed:
        return failed[0] or 1
    if srun or None in codes or not codes:
        return srun or 1
    return codes[0] or EXIT_OK if len(set(codes)) == 1 else TrainingError.exit_code


def _resume_point(step: int | None) -> str:
    return "the beginning" if not step else f"step {step}"


NOTHING_TO_DO = 100


def begin(job: Submission, task: JobTask, scheduler: Scheduler) -> RetryDecision:
    """Record that a task starts, unless it is complete, was asked to stop, or makes no progress."""
    history = read_history(task.launch)
    if history and history[-1].end is None:
        _append_lost_end(task, scheduler, history[-1].start)
        history = read_history(task.launch)
    step = newest_step(task.progress)
    steps = task.progress.steps if task.progress else None
    stop, retry = task.stop_file.exists(), job.cluster.retry
    decision = decide_start(history, step=step, steps=steps, stop=stop, retry=retry, since=job.submitted)
    if decision.go:
        _append(task, _start(job, scheduler, step))
        prune_rank_exits(task.launch)
    elif history and history[-1].end and history[-1].end.again:  # it was to continue, and now does not
        why: Why = "done" if not decision.code else "stopped" if stop else "failed"
        _append(task, End(why=why, code=decision.code, text=decision.text, again=False, time=now()))
    return decision


def _start(job: Submission, scheduler: Scheduler, step: int | None = None) -> Start:
    """Return a start at this moment; not before the submission, where this node's clock is behind the submitter's."""
    time_s = max(now(), job.submitted)
    return Start(job=scheduler.job, restart=scheduler.restart, nodes=scheduler.nodes, step=step, time=time_s)


def _append(task: JobTask, entry: Start | End) -> None:
    """Append to the history; on a disk error print a warning and continue."""
    try:
        write_entry(task.launch, entry)
    except OSError as error:
        log_line(f"warning: {task.name}: this {entry.kind} is missing from the history: {error}")


def _append_lost_end(task: JobTask, scheduler: Scheduler, start: Start) -> None:
    """Record the end of an attempt that left none: its node went down, or Slurm killed it before it could save."""
    down_nodes = scheduler.down_nodes([node for node in start.nodes if node not in scheduler.nodes])
    text = (
        f"{', '.join(down_nodes)} went down"
        if down_nodes
        else "it was interrupted before it could save, or its node failed"
    )
    why: Why = "node lost" if down_nodes else "unknown"
    _append(task, End(why=why, code=EXIT_RESUME, text=text, again=True, at_fault=down_nodes, time=now()))


def end(job: Submission, task: JobTask, scheduler: Scheduler, srun_code: int) -> RetryDecision:
    """Record the end of an attempt and decide whether the task continues.

    Args:
        srun_code: exit code of the program that ran the ranks.
    """
    history = read_history(task.launch)
    newest = history[-1].start if history else None
    unknown = newest is None or (newest.job, newest.restart) != (scheduler.job, scheduler.restart)
    if unknown:  # the start could not be recorded
        history = [*history, Attempt(_start(job, scheduler), None)]
    found = read_rank_exits(task.launch, scheduler.job, scheduler.restart, job.world_size)
    code = combined_exit_code([each.code if each else None for each in found], srun_code)
    why = _end_reason(job, task, scheduler, code)
    at_fault = _nodes_at_fault(task, code, found, scheduler) if why == "failed" else ()
    step = newest_step(task.progress)
    decision = decide_end(history, code=code, why=why, step=step, retry=job.cluster.retry, since=job.submitted)
    if unknown and decision.go:  # without a history, starts cannot be counted
        text = f"{decision.text}; not restarted, because its history cannot be written"
        decision = RetryDecision(False, text, code)
    text, failed = decision.text, next((each for each in found if each and each.code == code), None)
    if failed and code not in (EXIT_OK, EXIT_RESUME):
        text += f" (rank {failed.rank} on {failed.node}, exit code {code})"
    entry = End(why=why, code=code, text=text, again=decision.go, at_fault=at_fault, time=now())
    _append(task, entry)
    return decision._replace(text=text)


def _end_reason(job: Submission, task: JobTask, scheduler: Scheduler, code: int) -> Why:
    if code == EXIT_OK:
        return "done"
    if task.stop_file.exists() or scheduler.was_cancelled():
        return "stopped"
    return scheduler.stop_reason(job) if code == EXIT_RESUME else "failed"


def _nodes_at_fault(
    task: JobTask, code: int, found: Sequence[RankExit | None], scheduler: Scheduler
) -> tuple[str, ...]:
    """Return the node of the first failed rank if the node may be the cause: killed, hung, or an unknown error. Nodes
    that are down come before any rank."""
    if down := scheduler.down_nodes(scheduler.nodes):
        return down
    if code == HangError.exit_code and (hosts := hung_hosts(task.folder)):
        return tuple(sorted(hosts & set(scheduler.nodes)))
    failed = [each for each in found if each and each.code not in (EXIT_OK, EXIT_RESUME)]
    by_node = failed and (failed[0].code >= 128 or failed[0].code in (1, HangError.exit_code))
    return (failed[0].node,) if by_node else ()


def newest_step(progress: TaskProgress | None) -> int | None:
    """Return the step of the newest committed checkpoint, 0 if there is none; None without progress or if the store
    does not answer. Skipped steps at its end do not count: they trained nothing."""
    if progress is None:
        return None
    try:
        store = Store(progress.checkpoints)
        name = store.get("latest").decode().strip()
        return int(name.removeprefix("step-")) - _skipped_at_the_end(store, name)
    except ObjectMissing:
        return 0
    except (DataError, ValueError) as error:
        log_line(f"warning: cannot determine the newest step: {error}")
        return None


def _skipped_at_the_end(store: Store, name: str) -> int:
    try:
        return parse_manifest(store.get(f"{name}/manifest.json"), name).skipped_in_a_row
    except (ObjectMissing, CheckpointError):  # the run itself reports and skips a damaged checkpoint
        return 0


def log_line(text: str) -> None:
    """Print a line to the job's log."""
    print(f"launcher: {text}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str]) -> int:
    """Entry point of the batch script; returns its exit code."""
    shield_streams()
    action, folder, *rest = arguments
    job = read_job(Path(folder))
    task = job.tasks[int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))]
    scheduler = SlurmScheduler()
    if action == "begin":
        decision = begin(job, task, scheduler)
        log_line(f"{task.name}: {decision.text}")
        failing = set(bad_nodes(read_history(task.launch), job.cluster.retry)) & set(scheduler.nodes)
        if decision.go and failing:
            log_line(f"warning: running on {', '.join(sorted(failing))} despite failures there")
        return EXIT_OK if decision.go else (decision.code or NOTHING_TO_DO)
    decision = end(job, task, scheduler, int(rest[0]))
    log_line(f"{task.name}: {decision.text}")
    return _requeue(job, task, scheduler) if decision.go else decision.code


def _requeue(job: Submission, task: JobTask, scheduler: SlurmScheduler) -> int:
    """Requeue this job, then exclude the nodes on which it failed: Slurm accepts that for pending jobs only."""
    left_out = scheduler.excludable(job, bad := bad_nodes(read_history(task.launch), job.cluster.retry))
    if bad and not left_out:
        log_line(f"{', '.join(bad)} failed too often, but Slurm could not start the job without: not excluded")
    try:
        slurm.ask_patiently(lambda: slurm.requeue(scheduler.name))
    except BackendError as error:
        log_line(f"error: {error}; `regen jobs resume` continues")
        return EXIT_RESUME
    try:
        if left_out:
            slurm.ask_patiently(lambda: slurm.exclude(scheduler.name, [*job.cluster.exclude, *left_out]))
            log_line(f"excluded from now on: {', '.join(left_out)}")
    except BackendError as error:
        log_line(f"warning: requeued, but {', '.join(left_out)} could not be excluded: {error}")
    return EXIT_OK


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # requeueing a job ends it, and this process with it
    try:
        code = main(sys.argv[1:])
    except RegenError as error:
        log_line(f"error: {error}")
        code = error.exit_code
    raise SystemExit(code)
