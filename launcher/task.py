"""Task entry points: small callables that Submitit pickles and calls in every process of a job.

Each starts its command as a subprocess from the code snapshot, forwards signals and records the exit status. It uses
little memory, so that it survives when the kernel's out-of-memory killer ends a rank.
"""

from __future__ import annotations

import os
import signal
import socket
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from launcher import attempts
from launcher.job import JobTask, Submission, read_job
from launcher.retry import LocalScheduler, RetryDecision, begin, end, log_line
from launcher.supervise import FORWARDED, end_with, program_environment, rank_environment, rank_environments, supervise
from regen_dist.config.files import write_text_atomically
from regen_dist.distributed.environment import SLURM, RankInfo, meeting_port, rank_variables, read_variables
from regen_dist.errors import EXIT_OK, EXIT_RESUME
from regen_dist.observe.terminal import shield_streams
from regen_dist.programs import GPUS_PER_NODE, STOP_CHECKED, regen

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission

COMMAND = tuple(regen())
LOCAL_REQUEUE = 144  # exit code at which Submitit's local executor restarts a task with a new time limit


class _Task(ABC):
    """Part that Submitit needs of a task."""

    @abstractmethod
    def __call__(self) -> None:
        """Run the task."""

    def checkpoint(self) -> DelayedSubmission:
        """Return the same task: Submitit asks for it when a task is signalled before it has begun."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


@dataclass(frozen=True)
class SlurmTask(_Task):
    """One process of a Slurm job: one rank, or a single-process command."""

    folder: str  # of the submission

    def __call__(self) -> None:
        """Run the command; return normally where the batch script decides what follows.

        Raises:
            SystemExit: the rank failed; srun then ends the others.
        """
        from submitit import JobEnvironment

        shield_streams()
        job, here = read_job(Path(self.folder)), JobEnvironment()
        task = job.tasks[int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))]
        rank, restart = here.global_rank, int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        environment = child_environment(job)
        if job.distributed:
            environment |= _rank_variables(job, meeting_address(here.hostnames[0]), here.raw_job_id, restart)
        # Replaces Submitit's handlers, which would requeue the job after its command has ended.
        for number in FORWARDED:
            signal.signal(number, _ignore_signal)
        ended = supervise([*COMMAND, *task.command], {rank: environment}, logs=task.logs)
        node, code = os.environ.get("SLURMD_NODENAME") or socket.gethostname(), _code(ended.code, ended.signals)
        attempts.write_rank_exit(
            task.launch, here.raw_job_id, restart, rank=rank, node=node, code=code, signals=ended.signals
        )
        if code not in (EXIT_OK, EXIT_RESUME):
            raise SystemExit(code)


@dataclass(frozen=True)
class LocalTask(_Task):
    """A whole task on this machine, with all its ranks, under Submitit's local executor and the same restart policy."""

    folder: str
    index: int = 0

    @property
    def outcome(self) -> Path:
        """Path of the file with its exit code, which Submitit does not report."""
        return Path(self.folder) / f"outcome-{self.index}"

    def __call__(self) -> None:
        """Run to the end, then raise SystemExit with the task's exit code, or with Submitit's requeue code where the
        time limit restarts."""
        shield_streams()
        end_with(int(read_job(Path(self.folder)).id() or 0))  # Submitit's own process is between the two
        code = self._code()
        try:
            write_text_atomically(self.outcome, f"{code}\n")
        except OSError as error:
            log_line(f"warning: the exit code {code} could not be recorded: {error}")
        raise SystemExit(code)

    def _code(self) -> int:
        job = read_job(Path(self.folder))
        task = job.tasks[self.index]
        while True:
            scheduler = LocalScheduler(task)
            decision = begin(job, task, scheduler)
            log_line(f"{task.name}: {decision.text}")
            if decision.go:
                decision = self._start(job, task, scheduler)
            if not decision.go:
                return decision.code
            if scheduler.timed_out:
                return LOCAL_REQUEUE

    @staticmethod
    def _start(job: Submission, task: JobTask, scheduler: LocalScheduler) -> RetryDecision:
        inherited, ranks = child_environment(job), job.world_size
        places = rank_environments(rank_environment(inherited, ranks), ranks) if job.distributed else {0: inherited}
        ended = supervise([*COMMAND, *task.command], places, logs=task.logs)
        for rank, each in ended.codes.items():
            attempts.write_rank_exit(
                task.launch, scheduler.job, scheduler.restart, rank=rank, node=scheduler.nodes[0],
                code=_code(each, ended.signals), signals=ended.signals,
            )  # fmt: skip
        decision = end(job, task, scheduler, _code(ended.code, ended.signals))
        log_line(f"{task.name}: {decision.text}")
        return decision


def _ignore_signal(_number: int, _frame: FrameType | None) -> None:
    """Ignore a signal that arrives after the command has ended."""


def _code(code: int, signals: Sequence[str]) -> int:
    """Return 75 for a command ended by a signal that it was sent: it did not handle it (yet), but has not failed."""
    return EXIT_RESUME if code in {128 + signal.Signals[each] for each in signals} else code


def child_environment(job: Submission) -> dict[str, str]:
    """Return the environment of a command: the code snapshot precedes installed code and the current folder, and the
    requested number of GPUs keeps it from silently computing on CPU. A training obeys a file STOP that comes while it
    starts: an earlier one would have kept it from starting."""
    code = os.pathsep.join([str(job.code), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {"PYTHONPATH": code, GPUS_PER_NODE: str(job.cluster.gpus_per_node)}
    if job.distributed:
        own[STOP_CHECKED] = "1"
    return program_environment({**os.environ, **own})


def meeting_address(node: str) -> str:
    """Return the address of the first node: its name in Slurm or, where that is no host's name, what srun knows."""
    try:
        socket.getaddrinfo(node, None)
    except OSError:
        return os.environ.get("SLURM_LAUNCH_NODE_IPADDR", node)
    return node


def _rank_variables(job: Submission, address: str, job_id: str, restart: int) -> dict[str, str]:
    """Return the rank that Slurm assigned to this task, as the variables that the command reads."""
    cores = os.environ.get("SLURM_CPUS_PER_TASK", "1")
    threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": cores}
    scheduler = read_variables(os.environ, SLURM) or RankInfo()
    port = meeting_port(job_id, restart)
    return threads | rank_variables(scheduler, local_world_size=job.cluster.ranks_per_node, address=address, port=port)
