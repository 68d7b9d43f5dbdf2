"""Execution of a plan: on Slurm as dependent jobs, all at once; on this machine one step after the other."""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO

from launcher import slurm
from launcher.attempts import read_history
from launcher.job import LAUNCH, Submission
from launcher.pipelines.planning import PlannedStep
from launcher.pipelines.schema import expected_products, missing_outputs
from launcher.preflight import check
from launcher.preflight.report import PreflightError
from launcher.script import batch_script
from launcher.submit import submit, wait_for
from regen_dist.errors import EXIT_OK, EXIT_RESUME, DataError, RegenError
from regen_dist.shared_files import lock_alone
from regen_dist.tables import Table

Emit = Callable[[str], None]
_LOCK = "pipeline.lock"


def pipeline_lock(folder: Path) -> IO[str]:
    """Lock a pipeline for one command at a time, until the returned file is closed: two would submit each step twice.

    Raises:
        ConfigError: another command holds the lock.
    """
    return lock_alone(folder / _LOCK, "it submits the same pipeline: wait for its end")


def problems(plan: Sequence[PlannedStep], emit: Emit) -> list[str]:
    """Return the preflight problems of all steps. Outputs of earlier steps need not exist yet."""
    produced, found = list[str](), list[str]()
    for planned in plan:
        if planned.problem:
            found.append(f"{planned.name}: {planned.problem}")
        if planned.state == "run":
            report = check(planned.request, produced=produced)
            found += [f"{planned.name}: {problem}" for problem in report.problems]
            for note in report.notes:
                emit(f"note: {planned.name}: {note}")
        if planned.state != "complete":
            produced += expected_products(planned.step, planned.request)
    return found


def check_all(plan: Sequence[PlannedStep], *, force: bool, emit: Emit) -> None:
    """Run the checks of every step to be run and report all problems together.

    Raises:
        PreflightError: there are problems and `force` is not set; nothing is submitted.
    """
    found = problems(plan, emit)
    if found and not force:
        listed = "\n".join(f"  - {problem}" for problem in found)
        raise PreflightError(f"nothing was submitted: {len(found)} problem(s)\n{listed}\nFix them, or use --force")
    for problem in found:
        emit(f"warning: submitted despite: {problem}")


def run_on_slurm(plan: Sequence[PlannedStep], emit: Emit) -> dict[str, Submission]:
    """Submit the steps to be run, each with `afterok` on its predecessors; return the jobs of all running or pending
    steps. If one is refused, those submitted before it are cancelled.

    Raises:
        RegenError: Slurm refused a step.
    """
    jobs: dict[str, Submission] = {}
    submitted: dict[str, Submission] = {}
    for planned in plan:
        waits_for = [str(jobs[each].id()) for each in planned.before if each in jobs]
        if planned.state == "alive" and planned.job:
            jobs[planned.name] = planned.job
        if planned.state == "run":
            try:
                jobs[planned.name] = submitted[planned.name] = submit(planned.request, dependency(waits_for))
            except (RegenError, KeyboardInterrupt) as error:
                raise _cancel_submitted(submitted, planned, error) from error
        emit(_line(planned, jobs.get(planned.name), [each for each in planned.before if each in jobs]))
    return jobs


def dependency(jobs: Sequence[str]) -> str | None:
    """Return sbatch's dependency on the jobs of the predecessors."""
    return f"afterok:{':'.join(jobs)}" if jobs else None


def _cancel_submitted(submitted: dict[str, Submission], planned: PlannedStep, error: BaseException) -> RegenError:
    """Cancel submitted steps; return the error to raise."""
    cancelled, left = [], []
    for name, job in submitted.items():
        try:
            slurm.cancel(str(job.id()))
            cancelled.append(f"{name} (job {job.id()})")
        except RegenError as problem:
            left.append(f"{name} (job {job.id()}: {problem})")
    what = str(error) or "interrupted; `squeue` shows whether Slurm has the job nevertheless"
    texts = [f"step {planned.name}: {what}"]
    texts += [f"cancelled again: {', '.join(cancelled)}"] if cancelled else []
    texts += [f"could NOT be cancelled, and will run: {', '.join(left)}"] if left else []
    return RegenError("; ".join(texts))


def wait_for_jobs(jobs: dict[str, Submission], emit: Emit) -> int:
    """Wait for the jobs of all steps; return the first nonzero exit code."""
    codes = []
    for name, job in jobs.items():
        codes.append(wait_for(job))
        began = any(read_history(task.launch) for task in job.tasks)
        ended = f"ended with exit code {codes[-1]}" if began else "did not run"
        emit(f"{name}: {ended if codes[-1] else 'done'}")
    return next((code for code in codes if code), EXIT_OK)


def run_locally(plan: Sequence[PlannedStep], emit: Emit) -> int:
    """Run the steps one after the other on this machine; return the first nonzero exit code.

    Ctrl-C and SIGTERM ask the running step to save and end. A closed terminal leaves it running; the same command waits
    for it and continues.
    """
    with _terminated_as_interrupted():
        for planned in plan:
            emit(_line(planned, planned.job, []))
            if planned.state == "complete":
                continue
            job = planned.job if planned.state == "alive" and planned.job else submit(planned.request)
            emit(f"  watch it: regen jobs logs {shlex.quote(str(planned.request.base))} --follow")
            if code := _wait_for_step(planned, job, emit):
                return code
    return EXIT_OK


def _wait_for_step(planned: PlannedStep, job: Submission, emit: Emit) -> int:
    try:
        code = wait_for(job)
    except KeyboardInterrupt:
        emit(f"{planned.name}: asked to save and end")
        with suppress(ProcessLookupError):
            os.kill(int(str(job.id())), signal.SIGTERM)
        wait_for(job)
        emit("stopped; the same command continues")
        return EXIT_RESUME
    if code:
        emit(f"{planned.name} ended with exit code {code}; nothing after it was started")
        return code
    if gone := missing_outputs(planned.request, planned.step):
        raise DataError(f"step {planned.name} ended well, but {next(iter(gone))} is not there; correct its outputs")
    return EXIT_OK


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _line(planned: PlannedStep, job: Submission | None, before: Sequence[str]) -> str:
    if planned.state == "complete":
        return f"{planned.name}: skipped, {planned.why}"
    if planned.state == "alive":
        return f"{planned.name}: not submitted again, {planned.why}"
    waits = f", after {' and '.join(before)}" if before else ""
    tasks = f", {len(planned.request.tasks)} task(s)" if planned.step.array > 1 else ""
    where = f"job {job.id()}" if job and planned.request.cluster.kind == "slurm" else "runs here"
    return f"{planned.name}: {where}{tasks}{waits} ({planned.why})"


# `regen submit pipeline --dry-run`.

_HEAD = ("step", "after", "what", "state", "nodes x ranks", "tasks", "why")
_SHOWN = 3  # commands of an array that are printed


def table(plan: Sequence[PlannedStep]) -> Iterator[str]:
    """Yield a header and a line for every step."""
    return Table(_HEAD, list(map(_row, plan))).to_lines()


def _row(planned: PlannedStep) -> tuple[str, ...]:
    request, step = planned.request, planned.step
    what = f"train {step.train}" if step.train else " ".join((step.command or ())[:2])
    size = f"{request.cluster.nodes} x {request.cluster.ranks_per_node if request.distributed else 1}"
    part = f"{len(request.tasks)} of {step.array}" if len(request.tasks) < step.array else str(step.array)
    return planned.name, ", ".join(planned.before) or "-", what, planned.state, size, part, planned.why


def scripts(plan: Sequence[PlannedStep]) -> Iterator[str]:
    """Yield what each step would submit: its commands and, on Slurm, its batch script. Names in capitals are filled in
    at submission."""
    jobs = {each.name: str(each.job.id()) for each in plan if each.state == "alive" and each.job}
    for planned in plan:
        if planned.state != "run":
            continue
        request = planned.request
        yield f"\n# step {planned.name}"
        yield from (f"# regen {shlex.join(task.command)}" for task in request.tasks[:_SHOWN])
        if len(request.tasks) > _SHOWN:
            yield f"# … {len(request.tasks)} tasks in all"
        if request.cluster.kind == "slurm":
            waits_for = [jobs[each] for each in planned.before if each in jobs]
            job = request.job(request.base / LAUNCH / "DATE", request.base / LAUNCH / "code" / "HASH")
            yield batch_script(job, dependency(waits_for)).rstrip("\n")
        jobs[planned.name] = f"JOB-OF-{planned.name}"
