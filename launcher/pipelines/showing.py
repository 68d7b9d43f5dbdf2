"""What `regen submit pipeline --dry-run` prints."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

from launcher.job import LAUNCH
from launcher.pipelines.planning import Planned
from launcher.pipelines.running import dependency
from launcher.script import batch_script

_HEAD = ("step", "after", "what", "state", "nodes x ranks", "tasks", "why")
_SHOWN = 3  # commands of an array


def table(plan: Sequence[Planned]) -> Iterator[str]:
    """A line for every step, under a head."""
    rows = [_HEAD, *map(_row, plan)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _row(planned: Planned) -> tuple[str, ...]:
    order, step = planned.order, planned.step
    what = f"train {step.train}" if step.train else " ".join((step.command or ())[:2])
    size = f"{order.cluster.nodes} x {order.cluster.ranks_per_node if order.distributed else 1}"
    part = f"{len(order.tasks)} of {step.array}" if len(order.tasks) < step.array else str(step.array)
    return planned.name, ", ".join(planned.before) or "-", what, planned.state, size, part, planned.why


def scripts(plan: Sequence[Planned]) -> Iterator[str]:
    """What would be submitted of every step that is to run: its commands, and on Slurm its batch script. What is in
    capitals is given then."""
    jobs = {each.name: str(each.job.id()) for each in plan if each.state == "alive" and each.job}
    for planned in plan:
        if planned.state != "run":
            continue
        order = planned.order
        yield f"\n# step {planned.name}"
        yield from (f"# regen {shlex.join(task.command)}" for task in order.tasks[:_SHOWN])
        if len(order.tasks) > _SHOWN:
            yield f"# … {len(order.tasks)} tasks in all"
        if order.cluster.kind == "slurm":
            waits_for = [jobs[each] for each in planned.before if each in jobs]
            job = order.job(order.base / LAUNCH / "DATE", order.base / LAUNCH / "code" / "HASH")
            yield batch_script(job, dependency(waits_for)).rstrip("\n")
        jobs[planned.name] = f"JOB-OF-{planned.name}"
