"""How a task stands, from its history, its scheduler, and what lies in its folder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal, NamedTuple

from launcher.history import Attempt, End, read_history
from launcher.jobs.finding import Member
from launcher.jobs.queue import Queue, Told

State = Literal["pending", "running", "stopping", "requeued", "done", "stopped", "failed", "lost"]
ACTIVE: tuple[State, ...] = ("pending", "running", "stopping", "requeued")
NEVER = "it does not begin"
_MOMENT_S = 60.0  # a job that is requeued is COMPLETED or unknown for so long at most


class Standing(NamedTuple):
    """A state, and what there is to say about it."""

    state: State
    note: str = ""

    @property
    def active(self) -> bool:
        return self.state in ACTIVE


def standing(member: Member, queue: Queue, *, complete: bool = False) -> Standing:
    """How a task stands.

    Args:
        complete: its last step is done, as its checkpoints say.
    """
    history = [each for each in read_history(member.task.launch) if each.start.time >= member.job.submitted]
    return judge(history, queue.told(member), stop=member.task.stop_file.exists(), complete=complete)


def judge(history: Sequence[Attempt], told: Told | None, *, stop: bool, complete: bool) -> Standing:
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
        return Standing("stopping", NEVER) if stop and not history else _waits(history, end, told.reason)
    if told.works:
        if end:
            return _waits(history, end, "")
        return _works(history, stop=stop)
    if end and time.time() - end.time < _MOMENT_S and told.state in ("", "COMPLETED") and not stop:
        return _waits(history, end, "")
    return _gone(history, end, told.state, stop=stop, complete=complete)


def _ended(end: End) -> Standing:
    if end.why == "done":
        return Standing("done")
    return Standing("stopped") if end.why == "stopped" else Standing("failed", end.text)


def _waits(history: Sequence[Attempt], end: End | None, reason: str) -> Standing:
    reason = "" if reason == "None" else reason
    if not history:
        return Standing("pending", reason)
    why = end.why if end else "it was cut off"
    return Standing("requeued", f"{why}; {reason}" if reason else why)


def _works(history: Sequence[Attempt], *, stop: bool) -> Standing:
    if stop:
        return Standing("stopping")
    return Standing("running", "" if history else "it is starting")


def _by_history(history: Sequence[Attempt], end: End | None, *, stop: bool, complete: bool) -> Standing:
    if not history:
        return Standing("done") if complete else Standing("pending")
    return _waits(history, end, "") if end else _works(history, stop=stop)


def _gone(history: Sequence[Attempt], end: End | None, state: str, *, stop: bool, complete: bool) -> Standing:
    """It neither runs nor waits, and nobody has said a last word."""
    if complete:
        return Standing("done")
    if stop:
        return Standing("stopped")
    if state == "CANCELLED":
        return Standing("stopped", "cancelled in the queue of Slurm")
    if end:
        return Standing("lost", f"{end.why}, and then it was not requeued")
    if history:
        return Standing("lost", f"it was cut off{f' (Slurm: {state})' if state else ''}, and is not in the queue")
    if state and state != "COMPLETED":
        return Standing("failed", f"it ended before it began (Slurm: {state}); see its log by --launcher")
    return Standing("lost", "it never began, and is not in the queue")
