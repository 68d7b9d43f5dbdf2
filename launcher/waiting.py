"""Waiting for a job's end."""

from __future__ import annotations

import time

from launcher import here, slurm
from launcher.history import read_history
from launcher.job import Job, Task
from launcher.submitting import exit_code_here
from regen_dist.errors import EXIT_OK, EXIT_RESUME, RegenError

_LOCAL_POLL_S, _SLURM_POLL_S = 0.3, 5.0
_LIVING = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "STOPPED")


def wait_for(job: Job) -> int:
    """Block until a job has ended for good; its exit code: 0, or that of its first task that did not end well."""
    while is_alive(job):
        time.sleep(_LOCAL_POLL_S if job.cluster.kind == "local" else _SLURM_POLL_S)
    if job.cluster.kind == "local":
        code = exit_code_here(job)
        return RegenError.exit_code if code is None else code
    return next((code for code in map(last_code, job.tasks) if code), EXIT_OK)


def is_alive(job: Job) -> bool:
    """Whether a job runs, or waits to."""
    if job.cluster.kind == "local":
        return here.is_running(job)
    known = slurm.queue([job.id() or ""])
    # A job that is requeued is COMPLETED for a moment
    return any(state in _LIVING for state, _ in known.values()) or any(_goes_on(task) for task in job.tasks if known)


def _goes_on(task: Task) -> bool:
    history = read_history(task.launch)
    return bool(history) and history[-1].end is not None and history[-1].end.again


def last_code(task: Task) -> int:
    """The exit code of a task's newest start; 75 where it was cut off."""
    history = read_history(task.launch)
    if not history or history[-1].end is None:
        return EXIT_RESUME
    return history[-1].end.code
