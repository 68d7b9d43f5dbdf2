"""The first and the last word on every start of a task, said by its batch script:

    python -m launcher.retry begin FOLDER      may it go? 0: yes; 100: nothing is left to do; else: end with this code
    python -m launcher.retry end FOLDER CODE   what now? requeues the job, or ends with the code of its ranks

One process decides, where there would be hundreds. On this machine `launcher.task` asks the same functions. Runs before
any rank, so it imports no torch.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from pydantic import ValidationError

from launcher import slurm
from launcher.cluster import RetryConfig
from launcher.job import JobTask, Progress, Submission, read_job
from regen_dist.checkpoint.manifest import parse_manifest
from regen_dist.config.files import write_text_atomically
from regen_dist.config.run import Section
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
from regen_dist.observe.streams import shield_streams

# How each rank of a start ended: one small file a rank, written by the process above it, which outlives a rank that
# is killed.


class RankExit(Section):
    """A rank's exit code (128+n where signal n ended it), and what it had been told until then."""

    rank: int
    node: str
    code: int
    told: tuple[str, ...] = ()  # signals, in their order
    time: float


def folder(launch: Path, job: str, restart: int) -> Path:
    """Where the ranks of one start leave their word."""
    return launch / "ranks" / f"{job}-{restart}"


def write_rank_exit(
    launch: Path, job: str, restart: int, *, rank: int, node: str, code: int, told: Sequence[str]
) -> None:
    """Leave word of a rank that has ended; where the disk takes none, it is said, and known of its exit code alone."""
    ended = RankExit(rank=rank, node=node, code=code, told=tuple(told), time=time.time())
    try:
        write_text_atomically(folder(launch, job, restart) / f"rank-{rank:05d}.json", ended.model_dump_json() + "\n")
    except OSError as error:
        print(f"launcher: warning: no word is left of the end of rank {rank} ({code}): {error}", file=sys.stderr)


def prune_rank_exits(launch: Path, keep: int = 3) -> None:
    """Delete what the ranks of older starts have left: hundreds of files each."""
    folders = sorted((launch / "ranks").glob("*"), key=lambda each: each.stat().st_mtime)
    for old in folders[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def read_rank_exits(launch: Path, job: str, restart: int, world_size: int) -> list[RankExit | None]:
    """What the ranks of a start have left, in the order in which they ended; None for each that left no word."""
    found = []
    for path in folder(launch, job, restart).glob("rank-*.json"):
        try:
            found.append(RankExit.model_validate_json(path.read_text(encoding="utf-8")))
        except (OSError, ValidationError):
            continue
    silent: list[RankExit | None] = [None] * (world_size - len(found))
    return [*sorted(found, key=lambda each: each.time), *silent]


def hung_hosts(run: Path) -> set[str]:
    """The hosts of the ranks that stood still when the run ended with the exit code of a hang."""
    try:
        told = json.loads((run / "hang.json").read_text(encoding="utf-8"))
        return {each["host"].partition(".")[0] for each in told["ranks"]} if told["kind"] != "together" else set()
    except (OSError, ValueError, KeyError, TypeError):
        return set()


# The starts and ends of one task, as lines of `launch/starts.jsonl`. One process writes at a time: the batch script
# of the job, or the process that stands for it on this machine.

HISTORY_FILE = "starts.jsonl"
Why = Literal["done", "preempted", "time limit", "signal", "stopped", "failed", "node lost", "unknown"]


class Start(Section):
    """A start: which job, on which nodes, and from which step (None: not known, or no training)."""

    kind: Literal["start"] = "start"
    job: str
    restart: int
    nodes: tuple[str, ...]
    step: int | None = None
    time: float


class End(Section):
    """How the newest start ended, and what was made of it. `at_fault`: the nodes it failed on."""

    kind: Literal["end"] = "end"
    why: Why
    code: int
    text: str
    again: bool
    at_fault: tuple[str, ...] = ()
    time: float


class Attempt(NamedTuple):
    """A start and its end; None: it runs, or it was cut off before it could say anything."""

    start: Start
    end: End | None


def read_history(launch: Path) -> list[Attempt]:
    """Every start of a task, oldest first; lines that a crash cut short are left out."""
    attempts: list[Attempt] = []
    path = launch / HISTORY_FILE
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        entry = _parse(line)
        if isinstance(entry, Start):
            attempts.append(Attempt(entry, None))
        elif entry is not None and attempts:
            attempts[-1] = Attempt(attempts[-1].start, entry)
    return attempts


def _parse(line: str) -> Start | End | None:
    try:
        values = json.loads(line)
        return (Start if values["kind"] == "start" else End).model_validate(values)
    except (ValueError, KeyError, TypeError, ValidationError):
        return None


def write_entry(launch: Path, entry: Start | End) -> None:
    """Append a line, and sync it: the process may be killed right after."""
    launch.mkdir(parents=True, exist_ok=True)
    with (launch / HISTORY_FILE).open("ab") as file:
        # A line that was cut short must not swallow this one.
        file.write(b"" if _ends_well(launch / HISTORY_FILE) else b"\n")
        file.write(entry.model_dump_json().encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def archive_history(launch: Path, name: str) -> None:
    """Begin a new history; the old one is kept as `starts-NAME.jsonl`."""
    if (launch / HISTORY_FILE).is_file():
        os.replace(launch / HISTORY_FILE, launch / f"starts-{name}.jsonl")


def _ends_well(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def now() -> float:
    """Seconds since the epoch, as histories write them."""
    return round(time.time(), 3)


# Where a task starts: a Slurm job, or this machine. What the first and last word on a start ask of either.

_LATE_S = 120.0  # Slurm tells of a time limit up to a minute before it was asked to
_EARLY_S = 10.0  # this process began a little after its clock
_STARTED = time.monotonic()  # of this process, about


class Scheduler(Protocol):
    """What an attempt asks of the place that it runs in."""

    job: str
    restart: int
    nodes: tuple[str, ...]

    def why_stopped(self, job: Submission) -> Why:
        """Why ranks that ended well, with everything saved, were told to."""

    def lost(self, nodes: Sequence[str]) -> tuple[str, ...]:
        """Which of some nodes are down."""

    def leave_out(self, job: Submission, nodes: Sequence[str]) -> tuple[str, ...]:
        """Those of some nodes that the job can do without."""


@dataclass
class SlurmPlace:
    """The Slurm job that this process belongs to."""

    job: str = field(default_factory=lambda: os.environ["SLURM_JOB_ID"])
    restart: int = field(default_factory=lambda: int(os.environ.get("SLURM_RESTART_COUNT", "0")))
    nodes: tuple[str, ...] = field(default_factory=lambda: slurm.expand(os.environ.get("SLURM_JOB_NODELIST", "")))

    def why_stopped(self, job: Submission) -> Why:
        """A preemption is noted by the controller; a time limit is told by the clock; else somebody sent a signal."""
        told = slurm.show_job(self.job)
        if slurm.seconds_until(told.get("PreemptTime")) is not None:
            return "preempted"
        left_s = slurm.seconds_until(told.get("EndTime"))
        near = left_s is not None and left_s <= job.cluster.signal_lead_s + _LATE_S
        return "time limit" if near else "signal"

    def lost(self, nodes: Sequence[str]) -> tuple[str, ...]:
        """As the controller knows them."""
        return slurm.lost_nodes(nodes)

    def leave_out(self, job: Submission, nodes: Sequence[str]) -> tuple[str, ...]:
        """All, or none where the partition would become too small."""
        left = set(slurm.partition_nodes(job.cluster.partition)) - {*nodes, *job.cluster.exclude}
        return tuple(nodes) if len(left) >= job.cluster.nodes else ()


class LocalPlace:
    """This machine. Each start of a task has its number."""

    def __init__(self, task: JobTask) -> None:
        self.job = os.environ.get("SUBMITIT_LOCAL_JOB_ID", str(os.getpid()))
        self.restart = len(read_history(task.launch))
        self.nodes: tuple[str, ...] = (socket.gethostname(),)
        self.timed_out = False

    def why_stopped(self, job: Submission) -> Why:
        """Submitit's clock began with this process. Whoever sends a signal here wants it to stop, and can resume it:
        nobody takes the machine away for others."""
        limit_s = None if job.cluster.time_min is None else job.cluster.time_min * 60 - job.cluster.signal_lead_s
        self.timed_out = limit_s is not None and time.monotonic() - _STARTED >= limit_s - _EARLY_S
        return "time limit" if self.timed_out else "stopped"

    def lost(self, nodes: Sequence[str]) -> tuple[str, ...]:
        """None: it is this machine."""
        return ()

    def leave_out(self, job: Submission, nodes: Sequence[str]) -> tuple[str, ...]:
        """None: there is no other."""
        return ()


# What becomes of a task when it starts and when it ends: pure functions of its history.

# What a second start would say again, word for word.
PERMANENT = frozenset(error.exit_code for error in (ConfigError, CheckpointError, BackendError, TrainingError, RunBusy))
_FAILURES: tuple[Why, ...] = ("failed", "node lost", "unknown")


class RetryDecision(NamedTuple):
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
) -> RetryDecision:
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
        return RetryDecision(
            False, f"nothing is left to do: all {steps} steps are done" if steps else "it was done before"
        )
    if stop:
        return RetryDecision(
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
) -> RetryDecision:
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
        return RetryDecision(False, why, code)
    if code in PERMANENT:
        return RetryDecision(
            False, f"exit code {code} would come again: see its log, mend it, `regen jobs resume`", code
        )
    limits = _within_limits(history, step, retry)
    if not limits.go:
        return limits._replace(code=code)
    failures = _failures_in_a_row(history[:-1], step) + 1
    if why in _FAILURES and failures > retry.failures:
        told = f"it failed {failures} times without a new checkpoint between (retry.failures: {retry.failures})"
        return RetryDecision(False, told, code)
    return RetryDecision(True, f"{why}: it goes on from {_place(step)}")


def _within_limits(history: Sequence[Attempt], step: int | None, retry: RetryConfig) -> RetryDecision:
    if len(history) >= retry.starts:
        return RetryDecision(False, f"it was started {len(history)} times (retry.starts: {retry.starts})", EXIT_RESUME)
    stuck = _starts_without_progress(history, step)
    if stuck >= retry.starts_without_progress:
        return RetryDecision(
            False,
            f"it was started {stuck} times from {_place(step)} and made no new checkpoint (retry."
            f"starts_without_progress: {retry.starts_without_progress}); see its logs, or save more often",
            EXIT_RESUME,
        )
    return RetryDecision(True, f"from {_place(step)}")


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


NOTHING_TO_DO = 100


def begin(job: Submission, task: JobTask, place: Scheduler) -> RetryDecision:
    """Note that a task starts, unless it is done, was asked to stop, or gets nowhere."""
    history = read_history(task.launch)
    if history and history[-1].end is None:
        _note_lost_start(task, place, history[-1].start)
        history = read_history(task.launch)
    step = newest_step(task.progress)
    steps = task.progress.steps if task.progress else None
    stop, retry = task.stop_file.exists(), job.cluster.retry
    verdict = judge_start(history, step=step, steps=steps, stop=stop, retry=retry, since=job.submitted)
    if verdict.go:
        start = Start(job=place.job, restart=place.restart, nodes=place.nodes, step=step, time=now())
        _note(task, start)
        prune_rank_exits(task.launch)
    elif history and history[-1].end and history[-1].end.again:  # it was to go on, and does not
        why: Why = "done" if not verdict.code else "stopped" if stop else "failed"
        _note(task, End(why=why, code=verdict.code, text=verdict.text, again=False, time=now()))
    return verdict


def _note(task: JobTask, entry: Start | End) -> None:
    """Put it into the history; what a disk does not take is said, and the task goes on."""
    try:
        write_entry(task.launch, entry)
    except OSError as error:
        say(f"warning: {task.name}: this {entry.kind} is missing in the history: {error}")


def _note_lost_start(task: JobTask, place: Scheduler, start: Start) -> None:
    """The last start left no word of its end: its node is down, or Slurm ended it before it could save."""
    lost = place.lost([node for node in start.nodes if node not in place.nodes])
    text = f"{', '.join(lost)} went down" if lost else "it was cut off before it could save, or its node was"
    why: Why = "node lost" if lost else "unknown"
    _note(task, End(why=why, code=EXIT_RESUME, text=text, again=True, at_fault=lost, time=now()))


def end(job: Submission, task: JobTask, place: Scheduler, srun_code: int) -> RetryDecision:
    """Note how a start ended, and decide whether the task goes on.

    Args:
        srun_code: of the program that ran the ranks.
    """
    history = read_history(task.launch)
    if unknown := not history or not _is_of(history[-1].start, place):  # the disk did not take the start
        start = Start(job=place.job, restart=place.restart, nodes=place.nodes, time=now())
        history = [*history, Attempt(start, None)]
    found = read_rank_exits(task.launch, place.job, place.restart, job.world_size)
    code = overall_code([each.code if each else None for each in found], srun_code)
    why = _why(job, task, place, code)
    at_fault = _at_fault(task, code, found, place) if why == "failed" else ()
    step = newest_step(task.progress)
    verdict = judge_end(history, code=code, why=why, step=step, retry=job.cluster.retry, since=job.submitted)
    if unknown and verdict.go:  # without a history nobody counts the starts
        text = f"{verdict.text}; not started again, for its history cannot be written"
        verdict = RetryDecision(False, text, code)
    text = f"{verdict.text}{_who(code, found)}"
    entry = End(why=why, code=code, text=text, again=verdict.go, at_fault=at_fault, time=now())
    _note(task, entry)
    return verdict._replace(text=text)


def _is_of(start: Start, place: Scheduler) -> bool:
    return (start.job, start.restart) == (place.job, place.restart)


def _why(job: Submission, task: JobTask, place: Scheduler, code: int) -> Why:
    if code == EXIT_OK:
        return "done"
    if task.stop_file.exists():
        return "stopped"
    return place.why_stopped(job) if code == EXIT_RESUME else "failed"


def _at_fault(task: JobTask, code: int, found: Sequence[RankExit | None], place: Scheduler) -> tuple[str, ...]:
    """The node on which the first rank failed, in a way that may be the node's doing: killed, hung, or an error that
    is none of ours. Nodes that are down are at fault before any rank."""
    if down := place.lost(place.nodes):
        return down
    if code == HangError.exit_code and (hosts := hung_hosts(task.folder)):
        return tuple(sorted(hosts & set(place.nodes)))
    failed = [each for each in found if each and each.code not in (EXIT_OK, EXIT_RESUME)]
    by_node = failed and (failed[0].code >= 128 or failed[0].code in (1, HangError.exit_code))
    return (failed[0].node,) if by_node else ()


def _who(code: int, found: Sequence[RankExit | None]) -> str:
    failed = [each for each in found if each and each.code == code]
    if code in (EXIT_OK, EXIT_RESUME) or not failed:
        return ""
    return f" (rank {failed[0].rank} on {failed[0].node}, exit code {code})"


def newest_step(progress: Progress | None) -> int | None:
    """The step of the newest committed checkpoint, 0 where there is none; None for a task without, or where the store
    does not answer. Steps that were skipped at its end do not count: they have trained nothing."""
    if progress is None:
        return None
    try:
        store = Store(progress.checkpoints)
        name = store.get("latest").decode().strip()
        return int(name.removeprefix("step-")) - _skipped_at_the_end(store, name)
    except ObjectMissing:
        return 0
    except (DataError, ValueError) as error:
        say(f"warning: cannot tell how far it is: {error}")
        return None


def _skipped_at_the_end(store: Store, name: str) -> int:
    try:
        return parse_manifest(store.get(f"{name}/manifest.json"), name).skipped_in_a_row
    except (ObjectMissing, CheckpointError):  # damage is named by the run itself, which passes over it
        return 0


def say(text: str) -> None:
    """A line for the job's own log."""
    print(f"launcher: {text}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str]) -> int:
    """What the batch script calls; returns its exit code."""
    shield_streams()
    action, folder, *rest = arguments
    job = read_job(Path(folder))
    task = job.tasks[int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))]
    place = SlurmPlace()
    if action == "begin":
        verdict = begin(job, task, place)
        say(f"{task.name}: {verdict.text}")
        failing = set(bad_nodes(read_history(task.launch), job.cluster.retry)) & set(place.nodes)
        if verdict.go and failing:
            say(f"warning: runs on {', '.join(sorted(failing))} in spite of failures there")
        return EXIT_OK if verdict.go else (verdict.code or NOTHING_TO_DO)
    verdict = end(job, task, place, int(rest[0]))
    say(f"{task.name}: {verdict.text}")
    return _again(job, task, place) if verdict.go else verdict.code


def _again(job: Submission, task: JobTask, place: SlurmPlace) -> int:
    """Requeue this job, then keep it off the nodes that it failed on: only a job that waits can be told so."""
    bad = bad_nodes(read_history(task.launch), job.cluster.retry)
    left_out = place.leave_out(job, bad)
    if bad and not left_out:
        say(f"{', '.join(bad)} failed too often, but without it the job would not fit its partition: it is kept")
    try:
        slurm.requeue(place.job)
        if left_out:
            slurm.exclude(place.job, [*job.cluster.exclude, *left_out])
            say(f"left out from now on: {', '.join(left_out)}")
    except BackendError as error:
        say(f"error: {error}; `regen jobs resume` goes on")
        return EXIT_RESUME
    return EXIT_OK


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # to requeue a job is to end it, and this process with it
    try:
        code = main(sys.argv[1:])
    except RegenError as error:
        say(f"error: {error}")
        code = error.exit_code
    raise SystemExit(code)
