"""What `regen submit` prints."""

from __future__ import annotations

import sys
from pathlib import Path

from launcher.job import LAUNCH, Job
from launcher.preflight import check
from launcher.script import batch_script
from launcher.submitting import Order
from regen_dist.jsontext import json_text


def show(order: Order) -> None:
    """The resolved job and its batch script, as they would be submitted; the names in capitals are given then."""
    job = order.job(order.base / LAUNCH / "DATE", order.base / LAUNCH / "code" / "HASH")
    print("# the job")
    print(json_text(job.model_dump(mode="json", exclude={"submitted"}), indent=1))
    if job.cluster.kind == "slurm":
        print("# the batch script")
        print(batch_script(job), end="")
    report = check(order)
    for found in [*(f"note: {note}" for note in report.notes), *(f"problem: {each}" for each in report.problems)]:
        print(found, file=sys.stderr)


def check_and_say(order: Order, *, force: bool) -> None:
    """The checks before submitting: notes are printed; problems too if they are forced aside.

    Raises:
        PreflightError: there are problems, and no force.
    """
    report = check(order)
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    if not force:
        report.raise_problems(order.name)
    for problem in report.problems:
        print(f"warning: submitted in spite of: {problem}", file=sys.stderr)


def say_submitted(job: Job) -> None:
    """Where it went, and how to watch it."""
    where = "on this machine" if job.cluster.kind == "local" else f"to {job.cluster_name}"
    size = f"{job.cluster.nodes} node(s) x {job.cluster.ranks_per_node} rank(s)" if job.distributed else "1 process"
    array = f", {len(job.tasks)} tasks" if job.is_array else ""
    base = _relative(job.folder.parents[1])
    print(f"submitted {job.name} {where} as job {job.id()}: {size}{array}")
    print(f"watch it: regen jobs; regen jobs logs {base} --follow; regen jobs stop {base}")


def _relative(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
