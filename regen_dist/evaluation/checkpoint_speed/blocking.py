"""What a save costs the run that makes it: read from the run's record, which must have a line for every step.

A save stands between two steps, s and s + 1. The record tells when each line was written and how long each step took
without what stood between, so the clock says how long training stood still. A thread then writes while later steps go
on: those are compared with the steps that nothing disturbed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

from regen_dist.errors import DataError

COLD_STEPS = 2  # of a start: caches and pools fill
_CLOCKS_AGREE_S = 1e-3  # the record's clock and the one that measures


class Save(NamedTuple):
    """One save of a run; seconds.

    Args:
        step: after which it was made.
        blocked_s: for how long the saver says that it blocked: the copy, and where it is waited for, the writing.
        still_s: how long the loop stood still between two steps, by the clock.
        seconds: from the beginning of the copy until the checkpoint was committed.
        size_bytes: of all shards.
        beside: steps that were made, wholly or in part, while it was written.
        beside_s: how long they took together.
    """

    step: int
    blocked_s: float
    still_s: float
    seconds: float
    size_bytes: int
    beside: int
    beside_s: float


@dataclass(frozen=True)
class Saving:
    """The saves of a run that can be judged, and its undisturbed steps.

    Neither the first save, which makes the buffers, nor the last, which is waited for, is among them.
    """

    quiet_s: list[float]
    saves: list[Save]
    first_blocked_s: float

    @property
    def step_s(self) -> float:
        """An undisturbed step: the median."""
        return median(self.quiet_s)

    def lost_s(self, save: Save) -> float:
        """By how much the steps beside a save's writing were longer than undisturbed ones, all together."""
        return save.beside_s - save.beside * self.step_s

    def cost_s(self, save: Save) -> float:
        """What a save makes the run longer by."""
        return save.still_s + self.lost_s(save)


def saving(lines: Sequence[Mapping[str, Any]]) -> Saving:
    """What the record of a run, written from its start on with `train.log_every=1`, says of its saves.

    Raises:
        DataError: a save failed, or the run was too short to judge one.
    """
    steps = {line["step"]: line for line in lines if line["kind"] == "train"}
    saved = [line for line in lines if line["kind"] == "checkpoint"]
    if failed := [line["problem"] for line in saved if line["problem"]]:
        raise DataError(f"a checkpoint of the run was not saved: {failed[0]}")
    judged = [line for line in saved[1:] if line["step"] + 1 in steps]
    beside = {line["step"]: _beside(steps, line) for line in saved}
    disturbed = {step for each in beside.values() for step in each}
    quiet = [line["step_s"] for step, line in steps.items() if step > COLD_STEPS and step not in disturbed]
    if not judged or not quiet:
        raise DataError(
            f"a run of {len(steps)} steps with {len(saved)} saves cannot be judged: the first save and the last are "
            "left out, and some steps must be undisturbed. Raise train.steps, or change checkpoint.every"
        )
    saves = [_save(steps, line, beside[line["step"]]) for line in judged]
    return Saving(quiet, saves, saved[0]["blocked_s"])


def _save(steps: Mapping[int, Mapping[str, Any]], line: Mapping[str, Any], beside: Sequence[int]) -> Save:
    before, after = steps[line["step"]], steps[line["step"] + 1]
    return Save(
        step=line["step"],
        blocked_s=line["blocked_s"],
        still_s=after["time"] - before["time"] - after["step_s"],
        seconds=line["seconds"],
        size_bytes=line["bytes"],
        beside=len(beside),
        beside_s=sum(steps[step]["step_s"] for step in beside),
    )


def _beside(steps: Mapping[int, Mapping[str, Any]], line: Mapping[str, Any]) -> list[int]:
    """The steps that began after the save did and before it was committed."""
    committed = steps[line["step"]]["time"] + line["seconds"] - _CLOCKS_AGREE_S
    later = (step for step in steps if step > line["step"])
    return [step for step in later if steps[step]["time"] - steps[step]["step_s"] < committed]
