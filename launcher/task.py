"""What runs on the machines: a tiny callable, which Submitit pickles and calls in every process of a job.

It starts the command as a process of its own, from the copy of the code, hands on signals, and writes down how it
ended. It is light, so that what kills a rank (as the kernel does when memory runs out) leaves it alive to tell.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from launcher import retry
from launcher.job import JobTask, Submission, read_job
from launcher.retry import LocalPlace, RetryDecision, begin, end, say
from launcher.supervise import FORWARDED, JobExit, program_environment, rank_environment, rank_environments, supervise
from regen_dist.config.files import write_text_atomically
from regen_dist.distributed.environment import SLURM, RankInfo, meeting_port, rank_variables, read_variables
from regen_dist.errors import EXIT_OK, EXIT_RESUME
from regen_dist.observe.streams import shield_streams
from regen_dist.programs import GPUS_PER_NODE, regen

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission

COMMAND = tuple(regen())
LOCAL_REQUEUE = 144  # with this code Submitit's local executor starts a task again, its clock at zero


@dataclass(frozen=True)
class SlurmTask:
    """One process of a Slurm job: one rank, or a command alone."""

    folder: str  # of the submission

    def __call__(self) -> None:
        """Run, and end well where the batch script shall decide what follows.

        Raises:
            SystemExit: the rank failed; then srun ends the others.
        """
        from submitit import JobEnvironment

        shield_streams()
        job, here = read_job(Path(self.folder)), JobEnvironment()
        task = job.tasks[int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))]
        rank, restart = here.global_rank, int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        environment = child_environment(job)
        if job.distributed:
            environment |= _rank_variables(job, here.hostnames[0], here.raw_job_id, restart)
        for number in FORWARDED:  # not Submitit's handlers, which would requeue the job when its command has ended
            signal.signal(number, _leave_alone)
        ended = supervise([*COMMAND, *task.command], {rank: environment}, logs=task.logs)
        node, code = os.environ.get("SLURMD_NODENAME") or socket.gethostname(), _code(ended.code, ended.told)
        retry.write_rank_exit(task.launch, here.raw_job_id, restart, rank=rank, node=node, code=code, told=ended.told)
        if code not in (EXIT_OK, EXIT_RESUME):
            raise SystemExit(code)

    def checkpoint(self) -> DelayedSubmission:
        """What Submitit asks of a task that is told to stop before it has begun: nothing is saved, the same goes on."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


@dataclass(frozen=True)
class LocalTask:
    """A whole task on this machine, under Submitit's local executor: all its ranks, started again by the same rules."""

    folder: str
    index: int = 0

    @property
    def outcome(self) -> Path:
        """Where it leaves its code, which Submitit does not tell."""
        return Path(self.folder) / f"outcome-{self.index}"

    def __call__(self) -> None:
        """Run to the end, and leave with SystemExit: with the task's code, or with Submitit's where its clock shall
        begin again."""
        shield_streams()
        code = self._code()
        try:
            write_text_atomically(self.outcome, f"{code}\n")
        except OSError as error:
            say(f"warning: the exit code {code} is told to nobody: {error}")
        raise SystemExit(code)

    def _code(self) -> int:
        job = read_job(Path(self.folder))
        task = job.tasks[self.index]
        while True:
            place = LocalPlace(task)
            verdict = begin(job, task, place)
            say(f"{task.name}: {verdict.text}")
            if verdict.go:
                verdict = self._start(job, task, place)
            if not verdict.go:
                return verdict.code
            if place.timed_out:
                return LOCAL_REQUEUE

    @staticmethod
    def _start(job: Submission, task: JobTask, place: LocalPlace) -> RetryDecision:
        ended = _run_here(job, task)
        codes = {rank: _code(code, ended.told) for rank, code in ended.codes.items()}
        for rank, code in codes.items():
            retry.write_rank_exit(
                task.launch, place.job, place.restart, rank=rank, node=place.nodes[0], code=code, told=ended.told
            )
        verdict = end(job, task, place, _code(ended.code, ended.told))
        say(f"{task.name}: {verdict.text}")
        return verdict

    def checkpoint(self) -> DelayedSubmission:
        """As for a task of Slurm."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def _leave_alone(_number: int, _frame: FrameType | None) -> None:
    """What a process does with a signal when its command has ended."""


def _code(code: int, told: Sequence[str]) -> int:
    """A command that one of the signals ended that it was told has not failed: it cannot listen to them, or not yet."""
    return EXIT_RESUME if code in {128 + signal.Signals[each] for each in told} else code


def _run_here(job: Submission, task: JobTask) -> JobExit:
    inherited = child_environment(job)
    ranks = job.world_size
    places = rank_environments(rank_environment(inherited, ranks), ranks) if job.distributed else {0: inherited}
    return supervise([*COMMAND, *task.command], places, logs=task.logs)


def child_environment(job: Submission) -> dict[str, str]:
    """What a command inherits: the copy of the code comes before whatever is installed, and before the current
    folder; how many GPUs were asked for, so that it cannot compute without them unnoticed."""
    code = os.pathsep.join([str(job.code), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {"PYTHONPATH": code, GPUS_PER_NODE: str(job.cluster.gpus_per_node)}
    return program_environment({**os.environ, **own})


def _rank_variables(job: Submission, first_host: str, job_id: str, restart: int) -> dict[str, str]:
    """The rank that Slurm gives this task, in the variables that the command reads."""
    cores = os.environ.get("SLURM_CPUS_PER_TASK", "1")
    threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": cores}
    place = read_variables(os.environ, SLURM) or RankInfo()
    port = meeting_port(job_id, restart)
    return threads | rank_variables(place, local_world_size=job.cluster.ranks_per_node, address=first_host, port=port)
