"""Where a task starts: a Slurm job, or this machine. What the first and last word on a start ask of either."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from launcher import slurm
from launcher.history import Why, read_history
from launcher.job import Job, Task

_LATE_S = 120.0  # Slurm tells of a time limit up to a minute before it was asked to
_EARLY_S = 10.0  # this process began a little after its clock
_STARTED = time.monotonic()  # of this process, about


class Scheduler(Protocol):
    """What an attempt asks of the place that it runs in."""

    job: str
    restart: int
    nodes: tuple[str, ...]

    def why_stopped(self, job: Job) -> Why:
        """Why ranks that ended well, with everything saved, were told to."""

    def lost(self, nodes: Sequence[str]) -> tuple[str, ...]:
        """Which of some nodes are down."""

    def leave_out(self, job: Job, nodes: Sequence[str]) -> tuple[str, ...]:
        """Those of some nodes that the job can do without."""


@dataclass
class SlurmPlace:
    """The Slurm job that this process belongs to."""

    job: str = field(default_factory=lambda: os.environ["SLURM_JOB_ID"])
    restart: int = field(default_factory=lambda: int(os.environ.get("SLURM_RESTART_COUNT", "0")))
    nodes: tuple[str, ...] = field(default_factory=lambda: slurm.expand(os.environ.get("SLURM_JOB_NODELIST", "")))

    def why_stopped(self, job: Job) -> Why:
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

    def leave_out(self, job: Job, nodes: Sequence[str]) -> tuple[str, ...]:
        """All, or none where the partition would become too small."""
        left = set(slurm.partition_nodes(job.cluster.partition)) - {*nodes, *job.cluster.exclude}
        return tuple(nodes) if len(left) >= job.cluster.nodes else ()


class LocalPlace:
    """This machine. Each start of a task has its number."""

    def __init__(self, task: Task) -> None:
        self.job = os.environ.get("SUBMITIT_LOCAL_JOB_ID", str(os.getpid()))
        self.restart = len(read_history(task.launch))
        self.nodes: tuple[str, ...] = (socket.gethostname(),)
        self.timed_out = False

    def why_stopped(self, job: Job) -> Why:
        """Submitit's clock began with this process. Whoever sends a signal here wants it to stop, and can resume it:
        nobody takes the machine away for others."""
        limit_s = None if job.cluster.time_min is None else job.cluster.time_min * 60 - job.cluster.signal_lead_s
        self.timed_out = limit_s is not None and time.monotonic() - _STARTED >= limit_s - _EARLY_S
        return "time limit" if self.timed_out else "stopped"

    def lost(self, nodes: Sequence[str]) -> tuple[str, ...]:
        """None: it is this machine."""
        return ()

    def leave_out(self, job: Job, nodes: Sequence[str]) -> tuple[str, ...]:
        """None: there is no other."""
        return ()
