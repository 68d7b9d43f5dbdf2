"""The runs themselves: whether they are running, done, or could not go on from what they have."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from launcher.job import JOB_FILE, LAUNCH, Job, newest_job
from launcher.preflight.findings import Finding, Subject, note, problem
from launcher.waiting import is_alive
from regen_dist.errors import RegenError


def alive(subject: Subject) -> Iterator[Finding]:
    """No job works in the same folders."""
    wanted = {task.folder for task in subject.order.tasks}
    for base in dict.fromkeys([subject.order.base, *sorted(wanted), *_sweeps(subject.order.base.parent)]):
        try:
            job = newest_job(base)
            shared = _shared(job, base, subject) if job else []
            lives = job is not None and bool(shared) and is_alive(job)
        except RegenError as error:
            yield note(f"whether the newest job in {base} still runs could not be told: {error}")
            continue
        if job is not None and lives:
            which = "it" if len(wanted) == 1 else ", ".join(folder.name for folder in shared[:3])
            yield problem(
                f"job {job.id()} ({job.cluster_name}) runs or waits for {which} already, in {base}; wait for it, or "
                f"end it first: `regen jobs stop {base}`"
            )


def _shared(job: Job, base: Path, subject: Subject) -> list[Path]:
    """The folders of a job that this one would work in, too."""
    wanted = [task.folder for task in subject.order.tasks]
    return [base] if base == subject.order.base else [task.folder for task in job.tasks if task.folder in wanted]


def _sweeps(folder: Path) -> list[Path]:
    """Arrays of training whose runs lie in this folder."""
    return sorted({path.parents[2] for path in folder.glob(f"*-sweep/{LAUNCH}/*/{JOB_FILE}")})
