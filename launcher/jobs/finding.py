"""Which submissions lie under a folder, and which of them a user means."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from launcher.job import JOB_FILE, LAUNCH, Job, Task, read_job
from regen_dist.errors import ConfigError, RegenError

TASKS = "tasks"
DEPTH = 3  # runs/NAME, runs/PIPELINE/STEP, runs/ARRAY/tasks/00000
# What a run folder holds is not searched: there may be very much of it.
_NO_RUNS = frozenset({LAUNCH, "checkpoints", "logs", "heartbeats", "stacks", "pictures", "wandb", "__pycache__"})


@dataclass(frozen=True, eq=False)
class Member:
    """One task of a submission."""

    job: Job
    index: int

    @property
    def task(self) -> Task:
        return self.job.tasks[self.index]

    @property
    def queue_id(self) -> str:
        """What Slurm calls it."""
        return f"{self.job.id()}_{self.index}" if self.job.is_array else str(self.job.id())

    @property
    def base(self) -> Path:
        """The folder that its submission belongs to."""
        return self.job.folder.parents[1]


class Run(NamedTuple):
    """A folder that was submitted: one task or those of an array, each by its newest submission."""

    folder: Path
    members: tuple[Member, ...]


class Found(NamedTuple):
    """What lies under a folder. `plain`: runs that were started without the launcher. `unread`: why some are left
    out."""

    runs: list[Run]
    plain: list[Path]
    unread: list[str]


def find(root: Path, depth: int = DEPTH) -> Found:
    """Every run in `root` and below it, the one that was submitted last at the end."""
    jobs: list[Job] = []
    alone: list[Path] = []
    unread: list[str] = []
    for folder in _folders(root.absolute(), depth):
        jobs += _jobs(folder, unread)
        if (folder / "heartbeats").is_dir():
            alone.append(folder)
    runs = _gather(jobs)
    owned = {member.task.folder for run in runs for member in run.members}
    return Found(runs, [folder for folder in alone if folder not in owned], unread)


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


def _jobs(folder: Path, unread: list[str]) -> Iterator[Job]:
    """The submissions of a folder, those left out that no scheduler has taken."""
    for path in sorted((folder / LAUNCH).glob(f"*/{JOB_FILE}")):
        try:
            job = read_job(path.parent)
        except RegenError as error:
            unread.append(str(error))
            continue
        if job.id() is not None:
            yield job


def _gather(jobs: Iterable[Job]) -> list[Run]:
    """Each task belongs to the newest submission that has it: a part of an array may have been submitted again."""
    newest: dict[Path, Member] = {}
    for job in sorted(jobs, key=lambda each: each.submitted):
        for index, task in enumerate(job.tasks):
            newest[task.folder] = Member(job, index)
    bases: dict[Path, list[Member]] = {}
    for member in newest.values():
        bases.setdefault(member.base, []).append(member)
    runs = [Run(folder, tuple(members)) for folder, members in bases.items()]
    return sorted(runs, key=lambda run: max(member.job.submitted for member in run.members))


def choose(name: str, root: Path) -> list[Member]:
    """The tasks that a user means by a run folder, or by its name under `root`: of a run, of an array or a pipeline, or
    one task of an array.

    Raises:
        ConfigError: there is no such folder, or nothing was submitted there.
    """
    folder = _folder(name, root)
    around = [folder, *_siblings(folder), *folder.parents[1:2]]
    unread: list[str] = []
    runs = _gather(job for each in around for job in _jobs(each, unread))
    chosen = [member for run in runs for member in run.members if folder in (run.folder, member.task.folder)]
    chosen = chosen or [member for run in find(folder).runs for member in run.members]
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
    known = _names(find(root).runs, root)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or known[-5:]
    hint = f"; there are {', '.join(close)}" if close else ""
    raise ConfigError(f"{name}: no folder of this name here or in {root}{hint} (another root: --root)")


def _siblings(folder: Path) -> list[Path]:
    """Beside it: a sweep's folder lies beside those of its runs."""
    return [each.parent for each in sorted(folder.parent.glob(f"*/{LAUNCH}")) if each.parent != folder]


def _nothing_there(folder: Path) -> str:
    if (folder / "heartbeats").is_dir():
        return f"{folder}: was not started by `regen submit`; to end it well, create the file {folder / 'STOP'}"
    return f"{folder}: nothing was submitted here (no {LAUNCH}/*/{JOB_FILE})"


def _names(runs: Sequence[Run], root: Path) -> list[str]:
    return [shown_name(run.folder, root) for run in runs]


def shown_name(folder: Path, root: Path) -> str:
    """A run's name as it is given to `regen jobs`: relative to the root, and a task of an array as ARRAY/NUMBER."""
    root = root.absolute()
    if folder.parent.name == TASKS and folder.name.isdecimal():
        folder = folder.parents[1] / str(int(folder.name))
    return str(folder.relative_to(root)) if folder.is_relative_to(root) and folder != root else str(folder)
