"""Submitit executors of a job, and the batch script that is given to Slurm.

Nothing is interpolated into a shell unquoted; commands travel as argument lists.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import DelayedSubmission, JobPaths

from launcher import slurm
from launcher.cluster import ClusterConfig
from launcher.job import Submission
from launcher.retry import NOTHING_TO_DO
from launcher.task import SlurmTask
from regen_dist.errors import ConfigError
from regen_dist.programs import python


class BatchExecutor(submitit.SlurmExecutor):
    """Submitit's Slurm executor, usable where Slurm is not installed: the script can still be printed."""

    @classmethod
    def affinity(cls) -> int:
        return 2

    def submit_all(self, tasks: Sequence[SlurmTask]) -> str:
        """Submit one job for a single task or one array for several; return the job id. Submitit would start an array
        by an executor without our options, so arrays are submitted the way single jobs are.

        Raises:
            FailedJobError, FailedSubmissionError: from Submitit.
        """
        if len(tasks) > 1:
            self.parameters["map_count"] = len(tasks)
        JobPaths.get_first_id_independent_folder(self.folder).mkdir(parents=True, exist_ok=True)
        with slurm.client_variables_set():
            first = str(self._submit_command(self._submitit_command_str).job_id)
        names = [first] if len(tasks) == 1 else [f"{first}_{number}" for number in range(len(tasks))]
        for name, task in zip(names, tasks, strict=True):
            submission = DelayedSubmission(task)
            submission.set_timeout(self.parameters["time"], self.max_num_timeout)
            path = JobPaths(self.folder, job_id=name).submitted_pickle
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}")  # a task that has already begun waits for its file
            submission.dump(temporary)
            os.replace(temporary, path)
        return first

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        script = submission_file_path.read_text(encoding="utf-8")
        return ["sbatch", *slurm.options(script), str(submission_file_path)]


def slurm_executor(job: Submission, dependency: str | None = None) -> BatchExecutor:
    """Return the executor that submits this job."""
    program = job.cluster.python or shlex.quote(sys.executable)
    executor = BatchExecutor(submission_folder(job), max_num_timeout=job.cluster.retry.starts, python=program)
    executor.update_parameters(**submitit_parameters(job, dependency))
    return executor


def submission_folder(job: Submission) -> Path:
    """Return Submitit's folder.

    Raises:
        ConfigError: the path contains characters that Slurm would interpret.
    """
    path = job.folder / "submitit"
    if wrong := sorted({character for character in str(path) if character in "%\\\n"}):
        raise ConfigError(
            f"{str(path)!r}: Slurm interprets {', '.join(map(repr, wrong))} in log paths; choose another output folder"
        )
    return path


def batch_script(job: Submission, dependency: str | None = None) -> str:
    """Return the batch script that sbatch reads."""
    executor = slurm_executor(job, dependency)
    if job.is_array:
        executor.parameters["map_count"] = len(job.tasks)
    return str(executor._make_submission_file_text(executor._submitit_command_str, job.name))


def submitit_parameters(job: Submission, dependency: str | None = None) -> dict[str, Any]:
    """Return Submitit's parameters of a job."""
    cluster = job.cluster
    asked = {
        "job_name": job.name,
        "time": cluster.time_min,
        "signal_delay_s": cluster.signal_lead_s,
        "nodes": cluster.nodes if job.distributed else 1,  # a command is one process
        "ntasks_per_node": cluster.ranks_per_node if job.distributed else 1,
        "cpus_per_task": cluster.cpus_per_task,
        "gpus_per_node": _gpus(cluster),
        "mem": f"{round(cluster.memory_gb * 1024)}M" if cluster.memory_gb else None,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "exclude": ",".join(cluster.exclude) or None,
        "nodelist": ",".join(cluster.nodelist) or None,
        "exclusive": cluster.exclusive or None,
        "dependency": dependency,
        "array_parallelism": cluster.array_parallelism,
        "srun_args": [*_srun_arguments(cluster), *cluster.srun],
        "setup": _prolog(job),
        "teardown": _epilog(job),
    }
    given = {name: value for name, value in asked.items() if value is not None}
    return given | {"wckey": None, "additional_parameters": _options(job, dependency)}


def _srun_arguments(cluster: ClusterConfig) -> list[str]:
    """Return the arguments of srun. A rank that fails ends the others, which would otherwise block until their timeout.
    Since Slurm 22.05 srun no longer inherits --cpus-per-task from sbatch. Ranks get exactly what the script exports."""
    cores = [f"--cpus-per-task={cluster.cpus_per_task}"] if cluster.cpus_per_task else []
    return ["--kill-on-bad-exit=1", "--export=ALL", *cores]


def _gpus(cluster: ClusterConfig) -> int | str | None:
    if not cluster.gpus_per_node:
        return None
    return f"{cluster.gpu_type}:{cluster.gpus_per_node}" if cluster.gpu_type else cluster.gpus_per_node


def _options(job: Submission, dependency: str | None) -> dict[str, str | int | bool]:
    own: dict[str, str | int | bool] = {"chdir": str(job.workdir), "requeue": True}
    if dependency:
        own["kill-on-invalid-dep"] = "yes"  # otherwise it would stay in the queue forever
    chosen = {name.replace("_", "-"): value for name, value in job.cluster.sbatch.items() if value is not False}
    return chosen | own


def _prolog(job: Submission) -> list[str]:
    """Return the shell lines before the ranks: the environment, and the check whether the task should start."""
    exported = {**job.cluster.environment, "PYTHONSAFEPATH": "1"}
    return [
        *job.cluster.activate,
        *(f"export {name}={shlex.quote(value)}" for name, value in exported.items()),
        f"export PYTHONPATH={shlex.quote(str(job.code))}${{PYTHONPATH:+:$PYTHONPATH}}",
        "trap : TERM USR1 USR2 INT HUP  # this shell outlives the signal, to decide what follows",
        f"{_retry_command('begin', job)}; decision=$?",
        f"[ $decision -ne {NOTHING_TO_DO} ] || exit 0",
        "[ $decision -eq 0 ] || exit $decision",
    ]


def _epilog(job: Submission) -> list[str]:
    return ["code=$?", f'{_retry_command("end", job)} "$code"', "exit $?"]


def _retry_command(action: str, job: Submission) -> str:
    return shlex.join(python("-m", "launcher.retry", action, str(job.folder)))


def slurm_tasks(job: Submission) -> Sequence[SlurmTask]:
    """Return one callable per task; the array index selects the task."""
    return [SlurmTask(str(job.folder))] * len(job.tasks)
