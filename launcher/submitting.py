"""Making jobs, and handing them to a scheduler."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from launcher import here, slurm
from launcher.cluster import ClusterConfig
from launcher.history import set_aside
from launcher.job import ID_FILE, LAUNCH, Job, Progress, Task, new_folder, write_job
from launcher.script import callables, slurm_executor
from launcher.snapshot import take_snapshot
from regen_dist.config import AnyRunConfig, config_hash, to_yaml
from regen_dist.config.files import write_text_atomically
from regen_dist.errors import BackendError, RegenError
from regen_dist.jsontext import json_text


@dataclass(frozen=True)
class Order:
    """What shall run where, before anything is written.

    Args:
        name: of the job.
        base: the folder that it belongs to; its submissions are kept in `launch/` there.
        tasks: one, or those of an array.
        cluster: the place, with what the command line changed.
        cluster_name: what the user calls it.
        configs: of training tasks, in their order; empty for other commands.
    """

    name: str
    kind: Literal["train", "run", "sweep"]
    base: Path
    tasks: tuple[Task, ...]
    cluster: ClusterConfig
    cluster_name: str
    configs: tuple[AnyRunConfig, ...] = ()
    whole: str = ""  # fingerprint of the order that this is a part of

    @property
    def fingerprint(self) -> str:
        """Of what is run: another one, and a job that was done before is another job. Hexadecimal."""
        what = [[*task.command] for task in self.tasks] + [[config_hash(config)] for config in self.configs]
        return self.whole or hashlib.sha256(json_text(what).encode()).hexdigest()[:16]

    def part(self, tasks: Sequence[Task]) -> Order:
        """The same for some of its tasks."""
        configs = tuple(c for task, c in zip(self.tasks, self.configs, strict=False) if task in tasks)
        return replace(self, tasks=tuple(tasks), configs=configs, whole=self.fingerprint)

    @property
    def distributed(self) -> bool:
        return bool(self.configs)

    def job(self, folder: Path, code: Path) -> Job:
        """The same as a submission that is kept in `folder`."""
        return Job(
            name=self.name, kind=self.kind, cluster=self.cluster, cluster_name=self.cluster_name, tasks=self.tasks,
            distributed=self.distributed, folder=folder, workdir=Path.cwd(), code=code, submitted=time.time(),
            fingerprint=self.fingerprint,
        )  # fmt: skip


def train_task(config: AnyRunConfig, *, fresh: bool = False) -> Task:
    """Training as a task: by a copy of the resolved config in the run folder, so that nothing changes under a job that
    waits."""
    folder = config.folder.absolute()
    flags = ["--fresh"] if fresh else []
    progress = Progress(checkpoints=_absolute(config.checkpoints), steps=config.train.steps)
    command = ("train", *flags, "--", str(folder / LAUNCH / "config.yaml"))
    return Task(name=config.name, folder=folder, command=command, progress=progress)


def _absolute(url: str) -> str:
    return url if "://" in url else str(Path(url).absolute())


def train_order(config: AnyRunConfig, cluster: ClusterConfig, cluster_name: str, *, fresh: bool = False) -> Order:
    """One run."""
    task = train_task(config, fresh=fresh)
    return Order(config.name, "train", task.folder, (task,), cluster, cluster_name, (config,))


def command_order(
    name: str, base: Path, command: Sequence[str], cluster: ClusterConfig, cluster_name: str, *, tasks: int = 1
) -> Order:
    """Any command of `regen`, or an array of them: `{task}` and `{tasks}` in an argument stand for the task's number,
    from 0, and for how many there are."""
    base = base.absolute()

    def one(number: int) -> Task:
        filled = tuple(each.replace("{task}", str(number)).replace("{tasks}", str(tasks)) for each in command)
        folder = base if tasks == 1 else base / "tasks" / f"{number:05d}"
        return Task(name=name if tasks == 1 else f"{name}[{number}]", folder=folder, command=filled)

    return Order(name, "run", base, tuple(map(one, range(tasks))), cluster, cluster_name)


def submit(order: Order, dependency: str | None = None) -> Job:
    """Write everything that the job needs into its folder, and hand it to the scheduler; nothing stays of one that was
    refused.

    Args:
        dependency: for Slurm, as "afterok:123".

    Raises:
        RegenError: Slurm refused, or the job did not start here.
    """
    code = take_snapshot(order.base / LAUNCH / "code")
    job = order.job(new_folder(order.base), code)
    for task in order.tasks:
        if task.progress is None:  # a command that is submitted again shall run again
            set_aside(task.launch, job.folder.name)
    for task, config in zip(order.tasks, order.configs, strict=False):
        write_text_atomically(task.launch / "config.yaml", to_yaml(config))
    return hand_over(job, dependency)


def hand_over(job: Job, dependency: str | None = None) -> Job:
    """Give a job, whose folder and code are there, to its scheduler.

    Raises:
        RegenError: as of `submit`.
    """
    for task in job.tasks:
        task.stop_file.unlink(missing_ok=True)
    write_job(job)
    try:
        if job.cluster.kind == "local":
            here.start(job)
        else:
            write_text_atomically(job.folder / ID_FILE, f"{_sbatch(job, dependency)}\n")
    except RegenError:
        shutil.rmtree(job.folder, ignore_errors=True)  # it never was a job
        raise
    return job


def _sbatch(job: Job, dependency: str | None) -> str:
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    if not slurm.is_here():
        raise BackendError("sbatch is not found: submit where Slurm's programs are, or with --cluster local")
    executor = slurm_executor(job, dependency)
    try:
        return executor.submit_all(callables(job))
    except (FailedJobError, FailedSubmissionError) as error:
        raise BackendError(f"Slurm refused the job: {_said(error)}") from None


def _said(error: BaseException) -> str:
    """What sbatch printed, out of what Submitit makes of it."""
    lines = [line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()]
    return next((line for line in lines if "error:" in line), lines[-1] if lines else repr(error))


def exit_code_here(job: Job) -> int | None:
    """The exit code of a local job; None while it runs, or where it was killed."""
    path = job.folder / here.EXIT_FILE
    return int(path.read_text()) if path.is_file() else None
