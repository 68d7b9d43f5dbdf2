"""Submits the steps of a plan: to Slurm at once, as jobs that depend on each other; on this machine one by one."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence

from launcher import slurm
from launcher.job import Job
from launcher.pipelines.planning import Planned
from launcher.preflight import check
from launcher.preflight.report import PreflightError
from launcher.submitting import submit
from launcher.waiting import wait_for
from regen_dist.errors import EXIT_OK, EXIT_RESUME, RegenError

Tell = Callable[[str], None]


def check_all(plan: Sequence[Planned], *, force: bool, tell: Tell) -> None:
    """The checks of every step that is to run, told together. What an earlier step makes need not be there yet.

    Raises:
        PreflightError: there are problems, and no force: then nothing is submitted.
    """
    produced, problems = list[str](), list[str]()
    for planned in plan:
        if planned.state == "run":
            report = check(planned.order, produced=produced)
            problems += [f"{planned.name}: {problem}" for problem in report.problems]
            for note in report.notes:
                tell(f"note: {planned.name}: {note}")
        if planned.state != "complete":
            produced += _made(planned)
    if problems and not force:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise PreflightError(f"nothing was submitted: {len(problems)} problem(s)\n{listed}\nMend them, or use --force")
    for problem in problems:
        tell(f"warning: submitted in spite of: {problem}")


def _made(planned: Planned) -> list[str]:
    """What a step leaves for later ones: the folders of its outputs too, since a dataset is named by its folder."""
    outputs = [str(each) for each in planned.step.outputs]
    return [*outputs, *(each.rpartition("/")[0] for each in outputs), str(planned.order.base)]


def run_on_slurm(plan: Sequence[Planned], tell: Tell) -> list[Job]:
    """Submit what is to run, each step with `afterok` on those before it. If Slurm refuses one, those that were
    submitted for it are cancelled.

    Raises:
        RegenError: Slurm refused a step.
    """
    ids: dict[str, str] = {}
    jobs: list[Job] = []
    for planned in plan:
        if planned.state == "alive" and planned.job:
            ids[planned.name] = planned.job
        if planned.state == "run":
            waits_for = [ids[each] for each in planned.before if each in ids]
            try:
                job = submit(planned.order, f"afterok:{':'.join(waits_for)}" if waits_for else None)
            except RegenError as error:
                raise _take_back(jobs, planned, error) from error
            jobs.append(job)
            ids[planned.name] = job.id() or ""
        tell(_line(planned, ids.get(planned.name), [each for each in planned.before if each in ids]))
    return jobs


def _take_back(jobs: Sequence[Job], planned: Planned, error: RegenError) -> RegenError:
    for job in jobs:
        slurm.cancel(job.id() or "")
    taken = f"; cancelled again: {', '.join(f'{job.name} ({job.id()})' for job in jobs)}" if jobs else ""
    return RegenError(f"step {planned.name}: {error}{taken}")


def run_here(plan: Sequence[Planned], tell: Tell) -> int:
    """Run the steps one after the other on this machine, and wait for each; returns the first exit code that is not 0.

    Ctrl-C asks the step that runs to save and end; the same command goes on.
    """
    for planned in plan:
        if planned.state == "alive":
            raise RegenError(f"step {planned.name}: {planned.why}; wait for it, or stop it first")
        tell(_line(planned, None, []))
        if planned.state == "run" and (code := _see_through(submit(planned.order))):
            tell(f"{planned.name} ended with exit code {code}: see regen jobs logs {planned.order.base}")
            return code
    return EXIT_OK


def _see_through(job: Job) -> int:
    try:
        return wait_for(job)
    except KeyboardInterrupt:
        os.kill(int(job.id() or 0), signal.SIGTERM)
        return wait_for(job) or EXIT_RESUME


def _line(planned: Planned, job: str | None, before: Sequence[str]) -> str:
    if planned.state == "complete":
        return f"{planned.name}: skipped, {planned.why}"
    waits = f", after {' and '.join(before)}" if before else ""
    tasks = f", {len(planned.order.tasks)} task(s)" if planned.step.array > 1 else ""
    where = f"job {job}" if job else "runs here"
    return f"{planned.name}: {where}{tasks}{waits} ({planned.why})"
