"""What the schedulers say of jobs: one question to Slurm for all of them, a look at a lock for those of this
machine."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from typing import NamedTuple

from launcher import here, slurm
from launcher.history import read_history
from launcher.jobs.finding import Member
from regen_dist.errors import BackendError

WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT")
WORKING = ("RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT")


class Told(NamedTuple):
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

    def __init__(self, told: dict[str, Told], silence: str) -> None:
        self._told, self.silence = told, silence

    def told(self, member: Member) -> Told | None:
        """Of one task; None where it cannot be told from here."""
        if member.job.cluster.kind == "local":
            return _told_here(member)
        return None if self.silence else self._told.get(member.queue_id, Told())


def ask(members: Iterable[Member], *, must: bool = False) -> Queue:
    """Ask for all tasks that have not ended for good.

    Raises:
        BackendError: Slurm gives no answer, and it `must`.
    """
    slurms = {str(each.job.id()) for each in members if each.job.cluster.kind == "slurm" and not has_ended(each)}
    try:
        return Queue({name: Told(*told) for name, told in slurm.queue(sorted(slurms)).items()}, "")
    except BackendError as error:
        if must:
            raise
        return Queue({}, str(error))


def has_ended(member: Member) -> bool:
    """Whether this submission of the task has had its last word."""
    history = [each for each in read_history(member.task.launch) if each.start.time >= member.job.submitted]
    return bool(history) and history[-1].end is not None and not history[-1].end.again


def _told_here(member: Member) -> Told | None:
    history = [each for each in read_history(member.task.launch) if each.start.time >= member.job.submitted]
    if history and history[-1].start.nodes != (socket.gethostname(),):
        return None  # a lock of another machine tells nothing here
    if not here.is_running(member.job):
        return Told()
    return Told("RUNNING") if history or not member.job.is_array else Told("PENDING", "the tasks before it")
