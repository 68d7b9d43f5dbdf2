"""Which rank do the others wait for? Worked out from what every rank's heartbeat says, and put into words."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from regen_dist.observe.heartbeat import ENDED, FAILED, RUNNING, Beat, Seen, process_state

Kind = Literal["failed", "quiet", "behind", "together"]
_NAMED = 8  # ranks in a list, before it says how many more there are


class Finding(NamedTuple):
    """The ranks that the others wait for, and what tells them apart.

    failed: they ended with an error. quiet: they give no heartbeat. behind: they are in an earlier phase. together:
    nothing tells them apart, these are all ranks that still run.
    """

    kind: Kind
    ranks: tuple[Seen, ...]


def find_culprits(seen: Sequence[Seen], stale_s: float) -> Finding:
    """Who holds the others up, in this order: who failed, who gives no heartbeat for `stale_s`, who is behind.

    Ranks mark the same phases in the same order, so that the smallest (steps begun, place in the step) is behind. A
    rank that has ended well is ahead of the others in its last step.
    """
    if failed := tuple(each for each in seen if each.beat and each.beat.state == FAILED):
        return Finding("failed", failed)
    if quiet := tuple(each for each in seen if not _ended(each) and each.quiet_s >= stale_s):
        return Finding("quiet", quiet)
    known = [each for each in seen if each.beat]
    first = min(map(_progress, known), default=(0.0, 0.0))
    if len({(each.beat.begun, each.beat.phase) for each in known if each.beat}) > 1:
        return Finding("behind", tuple(each for each in known if _progress(each) == first))
    return Finding("together", tuple(known))


def _ended(seen: Seen) -> bool:
    return seen.beat is not None and seen.beat.state == ENDED


def _progress(seen: Seen) -> tuple[float, float]:
    assert seen.beat is not None
    return seen.beat.begun, math.inf if _ended(seen) else seen.beat.place


def describe(
    finding: Finding,
    world_size: int,
    stood_s: float,
    state_of: Callable[[Beat], str | None] = process_state,
) -> str:
    """One sentence that names rank, host, process, phase and step.

    Args:
        finding: what `find_culprits` gave.
        world_size: ranks of the run.
        stood_s: how long the observer has waited.
        state_of: a process's state letter, "" when it is gone, None when it cannot be known here.
    """
    first = finding.ranks[0]
    waited_s = max(stood_s, first.beat.stood_s) if first.beat else stood_s
    told = " by its last heartbeat" if finding.kind == "quiet" and first.beat else ""  # it may have gone on a little
    subject = f"{_names(finding, world_size)} stood still for {waited_s:.0f} s {_where(first.beat)}{told}"
    reason = _reason(finding.kind, first, state_of)
    others = "; the other ranks wait" if len(finding.ranks) < world_size else ""
    return f"{subject}{reason}{others}"


def _names(finding: Finding, world_size: int) -> str:
    first, number = finding.ranks[0], len(finding.ranks)
    process = f" on {first.beat.host} (process {first.beat.pid})" if first.beat else ""
    if number == 1:
        return f"rank {first.rank}{process} has"
    if number == world_size:
        return f"all {world_size} ranks have"
    listed = ", ".join(str(each.rank) for each in finding.ranks[:_NAMED])
    more = f" and {number - _NAMED} more" if number > _NAMED else ""
    return f"ranks {listed}{more}, first of them rank {first.rank}{process}, have"


def _where(beat: Beat | None) -> str:
    if beat is None:
        return "before the first heartbeat"
    mark = beat.mark
    return f"in phase '{mark.phase}' " + ("before the first step" if mark.step is None else f"of step {mark.step}")


def _reason(kind: Kind, seen: Seen, state_of: Callable[[Beat], str | None]) -> str:
    if kind == "failed" and seen.beat:
        return f": it ended with {seen.beat.why}"
    if kind == "quiet":
        return f": {_why_quiet(seen, state_of)}"
    if kind == "behind" and seen.beat and seen.beat.state != RUNNING:
        return ": it has ended, the others have not"
    return ""


def _why_quiet(seen: Seen, state_of: Callable[[Beat], str | None]) -> str:
    if seen.beat is None:
        return "it has not begun, or cannot write its heartbeat"
    state = state_of(seen.beat)
    if state is None:
        return f"no heartbeat for {seen.quiet_s:.0f} s, so it is stopped, dead, cut off, or its interpreter is blocked"
    if state in ("", "Z", "X"):
        return "its process is gone: killed, or out of memory"
    if state in "Tt":
        return "its process is stopped (SIGSTOP, or a debugger)"
    if state == "D":
        return "its process waits in the kernel, as for a file system that does not answer"
    return "its process runs, but its interpreter is blocked, or it cannot write its heartbeat"
