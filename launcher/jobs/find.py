"""Submitted jobs: search under a folder, selection by name, and state from scheduler and history."""

from __future__ import annotations

import difflib
import os
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from launcher import local_executor, slurm
from launcher.attempts import Attempt, End, attempts_since, read_history
from launcher.job import JOB_FILE, LAUNCH, JobTask, Submission, read_job
from regen_dist.errors import BackendError, CheckpointError, ConfigError, DataError, RegenError

TASKS = "tasks"
DEPTH = 3  # runs/NAME, runs/PIPELINE/STEP, runs/ARRAY/tasks/00000
# Run folders are not searched: they may hold very many files.
_NO_RUNS = frozenset({LAUNCH, "checkpoints", "logs", "heartbeats", "stacks", "pictures", "wandb", "__pycache__"})


@dataclass(frozen=True, eq=False)
class Member:
    """One task of a submission."""

    job: Submission
    index: int

    @property
    def task(self) -> JobTask:
        return self.job.tasks[self.index]

    @property
    def queue_id(self) -> str:
        """Job id (with array index) in Slurm's queue."""
        return f"{self.job.id()}_{self.index}" if self.job.is_array else str(self.job.id())

    @property
    def base(self) -> Path:
        """Folder that the submission belongs to."""
        return self.job.folder.parents[1]


class SubmittedRun(NamedTuple):
    """A submitted folder: one task or those of an array, each with its newest submission."""

    folder: Path
    members: tuple[Member, ...]


class FoundJobs(NamedTuple):
    """Search result. `plain`: runs started without the launcher. `unread`: reasons why submissions were skipped."""

    runs: list[SubmittedRun]
    plain: list[Path]
    unread: list[str]


def find_jobs(root: Path, depth: int = DEPTH) -> FoundJobs:
    """Return every run in `root` and below it, the newest submission last."""
    jobs: list[Submission] = []
    alone: list[Path] = []
    unread: list[str] = []
    for folder in _folders(root.absolute(), depth):
        jobs += _jobs(folder, unread)
        if (folder / "heartbeats").is_dir():
            alone.append(folder)
    runs = _gather(jobs)
    owned = {member.task.folder.resolve() for run in runs for member in run.members}
    plain: dict[Path, Path] = {}  # by its real path: a link to a run is that run
    for folder in sorted(alone, key=lambda each: each.is_symlink()):
        plain.setdefault(folder.resolve(), folder)
    return FoundJobs(runs, [folder for real, folder in plain.items() if real not in owned], unread)


def _folders(folder: Path, depth: int) -> Iterator[Path]:
    yield folder
    if depth == 0:
        return
    try:
        with os.scandir(folder) as entries:
            names = sorted(each.name for each in entries if each.is_dir() and each.name not in _NO_RUNS)
    except OSError:  # deleted meanwhile, or not readable
        return
    for name in names:
        if not name.startswith("."):
            yield from _folders(folder / name, depth - 1)


def _jobs(folder: Path, unread: list[str]) -> Iterator[Submission]:
    """Yield the submissions of a folder, except those that no scheduler accepted."""
    for path in sorted((folder / LAUNCH).glob(f"*/{JOB_FILE}")):
        try:
            job = read_job(path.parent)
        except RegenError as error:
            unread.append(str(error))
            continue
        if job.id() is not None:
            yield job


def _gather(jobs: Iterable[Submission]) -> list[SubmittedRun]:
    """Assign each task to the newest submission that contains it: part of an array may have been resubmitted."""
    newest: dict[Path, Member] = {}
    for job in sorted(jobs, key=lambda each: each.submitted):
        for index, task in enumerate(job.tasks):
            newest[task.folder.resolve()] = Member(job, index)
    bases: dict[Path, list[Member]] = {}
    for member in newest.values():
        bases.setdefault(member.base.resolve(), []).append(member)
    runs = [SubmittedRun(members[-1].base, tuple(members)) for members in bases.values()]
    return sorted(runs, key=lambda run: max(member.job.submitted for member in run.members))


def current_members(folder: Path) -> list[Member]:
    """Return every task that was submitted in a folder, by its newest submission there."""
    return [member for run in _gather(_jobs(folder, [])) for member in run.members]


def choose_job(name: str, root: Path) -> list[Member]:
    """Return the tasks of a run folder, given as a path or a name under `root`: a run, an array, a pipeline, or one
    task of an array.

    Raises:
        ConfigError: the folder does not exist, or nothing was submitted there.
    """
    folder = _folder(name, root)
    around = [folder, *_siblings(folder), *folder.parents[1:2]]
    unread: list[str] = []
    runs = _gather(job for each in around for job in _jobs(each, unread))
    real = folder.resolve()
    chosen = [
        member for run in runs for member in run.members if real in (run.folder.resolve(), member.task.folder.resolve())
    ]
    chosen = chosen or [member for run in find_jobs(folder).runs for member in run.members]
    if not chosen:
        raise ConfigError("\n".join([_explain_no_jobs(folder), *unread]))
    return chosen


def _folder(name: str, root: Path) -> Path:
    array, _, number = name.rpartition("/")
    task = Path(array, TASKS, f"{int(number):05d}") if array and number.isdecimal() else Path(name)
    for folder in (Path(name), root / name, task, root / task):
        waits = folder.parent.name == TASKS and (folder.parents[1] / LAUNCH).is_dir()  # pending: it has no folder yet
        if folder.is_dir() or waits:
            return folder.resolve() if folder.is_symlink() else Path(os.path.normpath(folder.absolute()))
    known = [shown_name(run.folder, root) for run in find_jobs(root).runs]
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or known[-5:]
    hint = f"; there are {', '.join(close)}" if close else ""
    raise ConfigError(f"{name}: no such folder here or in {root}{hint} (another root: --root)")


def _siblings(folder: Path) -> list[Path]:
    """Return the folders beside it: a sweep's folder is beside those of its runs."""
    return [each.parent for each in sorted(folder.parent.glob(f"*/{LAUNCH}")) if each.parent != folder]


def _explain_no_jobs(folder: Path) -> str:
    if was := _earlier_place(folder):
        return (
            f"{folder}: was moved; it was submitted as {was}, and its jobs know it by that path. Move it back, or "
            "submit it anew with the output folder that it has now"
        )
    if (folder / "heartbeats").is_dir():
        return (
            f"{folder}: not started by `regen submit`; what its ranks print is in {folder / 'logs'}; to stop it "
            f"cleanly, create the file {folder / 'STOP'}; its own `regen train` resumes it"
        )
    return f"{folder}: nothing was submitted here (no {LAUNCH}/*/{JOB_FILE})"


def _earlier_place(folder: Path) -> Path | None:
    """Return the place of a run folder at its submission; None if it has not moved or was never submitted."""
    for path in sorted((folder / LAUNCH).glob(f"*/{JOB_FILE}"), reverse=True):
        with suppress(RegenError):
            was = read_job(path.parent).folder.parents[1]
            return None if was.resolve() == folder.resolve() else was
    return None


def shown_name(folder: Path, root: Path) -> str:
    """Return the name that `regen jobs` accepts for a run: relative to the root; a task of an array is ARRAY/NUMBER."""
    root = root.absolute()
    if folder.parent.name == TASKS and folder.name.isdecimal():
        folder = folder.parents[1] / str(int(folder.name))
    return str(folder.relative_to(root)) if folder.is_relative_to(root) and folder != root else str(folder)


# Scheduler states: one query to Slurm for all jobs, and a lock check for jobs of this machine.

WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
SUSPENDED = ("SUSPENDED", "STOPPED")


class QueueState(NamedTuple):
    """A job's state in its scheduler's terms, and the reason; "" if the scheduler does not know it (any more)."""

    state: str = ""
    reason: str = ""

    @property
    def waits(self) -> bool:
        return self.state in WAITING

    @property
    def works(self) -> bool:
        return self.state not in ("", *WAITING, *slurm.ENDED)


class Queue:
    """Scheduler states of tasks. `no_answer`: the reason why Slurm did not answer."""

    def __init__(self, states: dict[str, QueueState], no_answer: str) -> None:
        self._states, self.no_answer = states, no_answer

    def state_of(self, member: Member) -> QueueState | None:
        """Return the state of a task; None if it cannot be determined from this machine."""
        if member.job.cluster.kind == "local":
            return _local_state(member)
        return None if self.no_answer else self._states.get(member.queue_id, QueueState())


def query_queue(members: Iterable[Member], *, must: bool = False) -> Queue:
    """Query the schedulers for all tasks whose end is not final.

    Raises:
        BackendError: Slurm does not answer and `must` is set.
    """
    slurms = {str(each.job.id()) for each in members if each.job.cluster.kind == "slurm" and not has_final_end(each)}
    try:
        return Queue({name: QueueState(*state) for name, state in slurm.queue(sorted(slurms)).items()}, "")
    except BackendError as error:
        if must:
            raise
        return Queue({}, str(error))


def has_final_end(member: Member) -> bool:
    """Return whether the history records a final end of this submission of the task."""
    history = attempts_since(read_history(member.task.launch), member.job.submitted)
    return bool(history) and history[-1].end is not None and not history[-1].end.again


def _local_state(member: Member) -> QueueState | None:
    history = attempts_since(read_history(member.task.launch), member.job.submitted)
    if history and history[-1].start.nodes != (socket.gethostname(),):
        return None  # locks of another machine cannot be checked
    if not local_executor.is_running_locally(member.job):
        return QueueState()
    return QueueState("RUNNING") if history or not member.job.is_array else QueueState("PENDING", "the tasks before it")


# Task state, derived from its history, its scheduler and the files in its folder.

State = Literal["pending", "running", "stopping", "requeued", "done", "stopped", "failed", "lost"]
ACTIVE: tuple[State, ...] = ("pending", "running", "stopping", "requeued")
NEVER = "it does not begin"
_MOMENT_S = 60.0  # a requeued job is COMPLETED or unknown for at most this long


class JobState(NamedTuple):
    """A state and its explanation."""

    state: State
    note: str = ""

    @property
    def active(self) -> bool:
        return self.state in ACTIVE


def job_state(member: Member, queue: Queue, *, complete: bool = False) -> JobState:
    """Return the state of a task.

    Args:
        complete: its checkpoints show that the last step is done.
    """
    history = attempts_since(read_history(member.task.launch), member.job.submitted)
    stop, trains = member.task.stop_file.exists(), member.task.progress is not None
    return derive_state(history, queue.state_of(member), stop=stop, complete=complete, trains=trains)


def derive_state(
    history: Sequence[Attempt], queue_state: QueueState | None, *, stop: bool, complete: bool, trains: bool = True
) -> JobState:
    """Derive the state of a task.

    Args:
        history: starts of the newest submission.
        queue_state: state from the scheduler; None: unknown, so that only the history counts.
        stop: its folder has a file STOP.
        complete: nothing is left to do.
        trains: it is a training; other commands may end with any code once told to stop.
    """
    end = history[-1].end if history else None
    if end and not end.again:
        return _state_of_ended(end, trains=trains)
    if queue_state is None:
        return _state_by_history(history, end, stop=stop, complete=complete)
    if queue_state.waits:
        if stop and not history:
            return JobState("stopping", NEVER)
        return _state_of_waiting(history, end, queue_state.reason)
    if queue_state.works:
        if end:
            return _state_of_waiting(history, end, "")
        running = _state_of_running(history, stop=stop)
        return running._replace(note="suspended by Slurm") if queue_state.state in SUSPENDED else running
    if end and time.time() - end.time < _MOMENT_S and queue_state.state in ("", "COMPLETED") and not stop:
        return _state_of_waiting(history, end, "")
    return _state_of_gone(history, end, queue_state.state, stop=stop, complete=complete)


def _state_of_ended(end: End, *, trains: bool) -> JobState:
    if end.why == "done":
        return JobState("done")
    if end.why != "stopped":
        return JobState("failed", end.text)
    if trains and end.code in (CheckpointError.exit_code, DataError.exit_code):  # DataError: its store did not answer
        return JobState("failed", "asked to stop, it could not save: see its log")
    return JobState("stopped")


def _state_of_waiting(history: Sequence[Attempt], end: End | None, reason: str) -> JobState:
    reason = "" if reason == "None" else reason
    if not history:
        return JobState("pending", reason)
    why = end.why if end else "it was cut off"
    return JobState("requeued", f"{why}; {reason}" if reason else why)


def _state_of_running(history: Sequence[Attempt], *, stop: bool) -> JobState:
    if stop:
        return JobState("stopping")
    return JobState("running", "" if history else "it is starting")


def _state_by_history(history: Sequence[Attempt], end: End | None, *, stop: bool, complete: bool) -> JobState:
    if not history:
        return JobState("done") if complete else JobState("pending")
    return _state_of_waiting(history, end, "") if end else _state_of_running(history, stop=stop)


def _state_of_gone(history: Sequence[Attempt], end: End | None, state: str, *, stop: bool, complete: bool) -> JobState:
    """Return the state of a task that neither runs nor waits and has no recorded end."""
    if complete:
        return JobState("done")
    if stop:
        return JobState("stopped")
    if state == "CANCELLED":
        return JobState("stopped", "cancelled in the queue of Slurm")
    if end:
        return JobState("lost", f"{end.why}, and then it was not started again")
    if history:
        return JobState("lost", f"it was cut off{f' (Slurm: {state})' if state else ''}, and neither runs nor waits")
    if state and state != "COMPLETED":
        return JobState("failed", f"it ended before it began (Slurm: {state}); see its log by --launcher")
    return JobState("lost", "it never began, and neither runs nor waits")
