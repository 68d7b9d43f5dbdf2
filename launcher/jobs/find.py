"""Which submissions lie under a folder, and which of them a user means."""

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
from launcher.job import JOB_FILE, LAUNCH, JobTask, Submission, read_job
from launcher.retry import Attempt, End, read_history
from regen_dist.errors import BackendError, ConfigError, RegenError

TASKS = "tasks"
DEPTH = 3  # runs/NAME, runs/PIPELINE/STEP, runs/ARRAY/tasks/00000
# What a run folder holds is not searched: there may be very much of it.
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
        """What Slurm calls it."""
        return f"{self.job.id()}_{self.index}" if self.job.is_array else str(self.job.id())

    @property
    def base(self) -> Path:
        """The folder that its submission belongs to."""
        return self.job.folder.parents[1]


class SubmittedRun(NamedTuple):
    """A folder that was submitted: one task or those of an array, each by its newest submission."""

    folder: Path
    members: tuple[Member, ...]


class FoundJobs(NamedTuple):
    """What lies under a folder. `plain`: runs that were started without the launcher. `unread`: why some are left
    out."""

    runs: list[SubmittedRun]
    plain: list[Path]
    unread: list[str]


def find_jobs(root: Path, depth: int = DEPTH) -> FoundJobs:
    """Every run in `root` and below it, the one that was submitted last at the end."""
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
    except OSError:  # gone meanwhile, or not for us to read
        return
    for name in names:
        if not name.startswith("."):
            yield from _folders(folder / name, depth - 1)


def _jobs(folder: Path, unread: list[str]) -> Iterator[Submission]:
    """The submissions of a folder, those left out that no scheduler has taken."""
    for path in sorted((folder / LAUNCH).glob(f"*/{JOB_FILE}")):
        try:
            job = read_job(path.parent)
        except RegenError as error:
            unread.append(str(error))
            continue
        if job.id() is not None:
            yield job


def _gather(jobs: Iterable[Submission]) -> list[SubmittedRun]:
    """Each task belongs to the newest submission that has it: a part of an array may have been submitted again."""
    newest: dict[Path, Member] = {}
    for job in sorted(jobs, key=lambda each: each.submitted):
        for index, task in enumerate(job.tasks):
            newest[task.folder.resolve()] = Member(job, index)
    bases: dict[Path, list[Member]] = {}
    for member in newest.values():
        bases.setdefault(member.base.resolve(), []).append(member)
    runs = [SubmittedRun(members[-1].base, tuple(members)) for members in bases.values()]
    return sorted(runs, key=lambda run: max(member.job.submitted for member in run.members))


def choose_job(name: str, root: Path) -> list[Member]:
    """The tasks that a user means by a run folder, or by its name under `root`: of a run, of an array or a pipeline, or
    one task of an array.

    Raises:
        ConfigError: there is no such folder, or nothing was submitted there.
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
        raise ConfigError("\n".join([_nothing_there(folder), *unread]))
    return chosen


def _folder(name: str, root: Path) -> Path:
    array, _, number = name.rpartition("/")
    task = Path(array, TASKS, f"{int(number):05d}") if array and number.isdecimal() else Path(name)
    for folder in (Path(name), root / name, task, root / task):
        waits = folder.parent.name == TASKS and (folder.parents[1] / LAUNCH).is_dir()  # it has no folder yet
        if folder.is_dir() or waits:
            return folder.resolve() if folder.is_symlink() else Path(os.path.normpath(folder.absolute()))
    known = _names(find_jobs(root).runs, root)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or known[-5:]
    hint = f"; there are {', '.join(close)}" if close else ""
    raise ConfigError(f"{name}: no folder of this name here or in {root}{hint} (another root: --root)")


def _siblings(folder: Path) -> list[Path]:
    """Beside it: a sweep's folder lies beside those of its runs."""
    return [each.parent for each in sorted(folder.parent.glob(f"*/{LAUNCH}")) if each.parent != folder]


def _nothing_there(folder: Path) -> str:
    if was := _earlier_place(folder):
        return (
            f"{folder}: was moved; it was submitted as {was}, and its jobs know it by that path. Move it back, or "
            "submit it anew with the output folder that it has now"
        )
    if (folder / "heartbeats").is_dir():
        return f"{folder}: was not started by `regen submit`; to end it well, create the file {folder / 'STOP'}"
    return f"{folder}: nothing was submitted here (no {LAUNCH}/*/{JOB_FILE})"


def _earlier_place(folder: Path) -> Path | None:
    """Where a run folder was when it was submitted; None where it still is there, or never was submitted."""
    for path in sorted((folder / LAUNCH).glob(f"*/{JOB_FILE}"), reverse=True):
        with suppress(RegenError):
            was = read_job(path.parent).folder.parents[1]
            return None if was.resolve() == folder.resolve() else was
    return None


def _names(runs: Sequence[SubmittedRun], root: Path) -> list[str]:
    return [shown_name(run.folder, root) for run in runs]


def shown_name(folder: Path, root: Path) -> str:
    """A run's name as it is given to `regen jobs`: relative to the root, and a task of an array as ARRAY/NUMBER."""
    root = root.absolute()
    if folder.parent.name == TASKS and folder.name.isdecimal():
        folder = folder.parents[1] / str(int(folder.name))
    return str(folder.relative_to(root)) if folder.is_relative_to(root) and folder != root else str(folder)


# What the schedulers say of jobs: one question to Slurm for all of them, a look at a lock for those of this
# machine.

WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT")
WORKING = ("RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT")


class QueueState(NamedTuple):
    """A job's state in its scheduler's words, and the reason for it; "" where it is not known there (any more)."""

    state: str = ""
    reason: str = ""

    @property
    def waits(self) -> bool:
        return self.state in WAITING

    @property
    def works(self) -> bool:
        return self.state in WORKING


class Queue:
    """The answers for some tasks. `silence`: why Slurm gave none."""

    def __init__(self, told: dict[str, QueueState], silence: str) -> None:
        self._told, self.silence = told, silence

    def told(self, member: Member) -> QueueState | None:
        """Of one task; None where it cannot be told from here."""
        if member.job.cluster.kind == "local":
            return _told_here(member)
        return None if self.silence else self._told.get(member.queue_id, QueueState())


def query_queue(members: Iterable[Member], *, must: bool = False) -> Queue:
    """Ask for all tasks that have not ended for good.

    Raises:
        BackendError: Slurm gives no answer, and it `must`.
    """
    slurms = {str(each.job.id()) for each in members if each.job.cluster.kind == "slurm" and not has_ended(each)}
    try:
        return Queue({name: QueueState(*told) for name, told in slurm.queue(sorted(slurms)).items()}, "")
    except BackendError as error:
        if must:
            raise
        return Queue({}, str(error))


def has_ended(member: Member) -> bool:
    """Whether this submission of the task has had its last word."""
    history = [each for each in read_history(member.task.launch) if each.start.time >= member.job.submitted]
    return bool(history) and history[-1].end is not None and not history[-1].end.again


def _told_here(member: Member) -> QueueState | None:
    history = [each for each in read_history(member.task.launch) if each.start.time >= member.job.submitted]
    if history and history[-1].start.nodes != (socket.gethostname(),):
        return None  # a lock of another machine tells nothing here
    if not local_executor.is_running_locally(member.job):
        return QueueState()
    return QueueState("RUNNING") if history or not member.job.is_array else QueueState("PENDING", "the tasks before it")


# How a task stands, from its history, its scheduler, and what lies in its folder.

State = Literal["pending", "running", "stopping", "requeued", "done", "stopped", "failed", "lost"]
ACTIVE: tuple[State, ...] = ("pending", "running", "stopping", "requeued")
NEVER = "it does not begin"
_MOMENT_S = 60.0  # a job that is requeued is COMPLETED or unknown for so long at most


class JobState(NamedTuple):
    """A state, and what there is to say about it."""

    state: State
    note: str = ""

    @property
    def active(self) -> bool:
        return self.state in ACTIVE


def job_state(member: Member, queue: Queue, *, complete: bool = False) -> JobState:
    """How a task stands.

    Args:
        complete: its last step is done, as its checkpoints say.
    """
    history = [each for each in read_history(member.task.launch) if each.start.time >= member.job.submitted]
    return judge(history, queue.told(member), stop=member.task.stop_file.exists(), complete=complete)


def judge(history: Sequence[Attempt], told: QueueState | None, *, stop: bool, complete: bool) -> JobState:
    """The same from what was found.

    Args:
        history: the starts of the newest submission.
        told: by its scheduler; None: there is no answer, and only the history tells.
        stop: its folder has a file STOP.
        complete: nothing is left to do.
    """
    end = history[-1].end if history else None
    if end and not end.again:
        return _ended(end)
    if told is None:
        return _by_history(history, end, stop=stop, complete=complete)
    if told.waits:
        return JobState("stopping", NEVER) if stop and not history else _waits(history, end, told.reason)
    if told.works:
        if end:
            return _waits(history, end, "")
        return _works(history, stop=stop)
    if end and time.time() - end.time < _MOMENT_S and told.state in ("", "COMPLETED") and not stop:
        return _waits(history, end, "")
    return _gone(history, end, told.state, stop=stop, complete=complete)


def _ended(end: End) -> JobState:
    if end.why == "done":
        return JobState("done")
    return JobState("stopped") if end.why == "stopped" else JobState("failed", end.text)


def _waits(history: Sequence[Attempt], end: End | None, reason: str) -> JobState:
    reason = "" if reason == "None" else reason
    if not history:
        return JobState("pending", reason)
    why = end.why if end else "it was cut off"
    return JobState("requeued", f"{why}; {reason}" if reason else why)


def _works(history: Sequence[Attempt], *, stop: bool) -> JobState:
    if stop:
        return JobState("stopping")
    return JobState("running", "" if history else "it is starting")


def _by_history(history: Sequence[Attempt], end: End | None, *, stop: bool, complete: bool) -> JobState:
    if not history:
        return JobState("done") if complete else JobState("pending")
    return _waits(history, end, "") if end else _works(history, stop=stop)


def _gone(history: Sequence[Attempt], end: End | None, state: str, *, stop: bool, complete: bool) -> JobState:
    """It neither runs nor waits, and nobody has said a last word."""
    if complete:
        return JobState("done")
    if stop:
        return JobState("stopped")
    if state == "CANCELLED":
        return JobState("stopped", "cancelled in the queue of Slurm")
    if end:
        return JobState("lost", f"{end.why}, and then it was not requeued")
    if history:
        return JobState("lost", f"it was cut off{f' (Slurm: {state})' if state else ''}, and is not in the queue")
    if state and state != "COMPLETED":
        return JobState("failed", f"it ended before it began (Slurm: {state}); see its log by --launcher")
    return JobState("lost", "it never began, and is not in the queue")
