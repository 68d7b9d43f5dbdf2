"""Submits the steps of a plan: to Slurm at once, as jobs that depend on each other; on this machine one by one."""

from __future__ import annotations

import fcntl
import os
import shlex
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from launcher import slurm
from launcher.job import LAUNCH, Submission
from launcher.pipelines.planning import PlannedStep
from launcher.pipelines.schema import made, missing_outputs
from launcher.preflight import check
from launcher.preflight.report import PreflightError
from launcher.retry import read_history
from launcher.script import batch_script
from launcher.submit import submit, wait_for
from regen_dist.errors import EXIT_OK, EXIT_RESUME, DataError, RegenError

Tell = Callable[[str], None]
_LOCK = "pipeline.lock"


@contextmanager
def held(folder: Path, tell: Tell) -> Iterator[None]:
    """One command at a time works on a pipeline: two would submit each step twice.

    Raises:
        RegenError: another does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise RegenError(f"{folder}: another `regen submit pipeline` ({lock.read().strip()}) works on it") from None
        except OSError as error:
            tell(f"note: {folder}: no locks there ({error.strerror}); see to it that no other command works on it")
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        lock.flush()
        yield


def problems(plan: Sequence[PlannedStep], tell: Tell) -> list[str]:
    """What the checks of all steps find, each with its step. What an earlier step makes need not be there yet."""
    produced, found = list[str](), list[str]()
    for planned in plan:
        if planned.problem:
            found.append(f"{planned.name}: {planned.problem}")
        if planned.state == "run":
            report = check(planned.request, produced=produced)
            found += [f"{planned.name}: {problem}" for problem in report.problems]
            for note in report.notes:
                tell(f"note: {planned.name}: {note}")
        if planned.state != "complete":
            produced += made(planned.step, planned.request)
    return found


def check_all(plan: Sequence[PlannedStep], *, force: bool, tell: Tell) -> None:
    """The checks of every step that is to run, told together.

    Raises:
        PreflightError: there are problems, and no force: then nothing is submitted.
    """
    found = problems(plan, tell)
    if found and not force:
        listed = "\n".join(f"  - {problem}" for problem in found)
        raise PreflightError(f"nothing was submitted: {len(found)} problem(s)\n{listed}\nMend them, or use --force")
    for problem in found:
        tell(f"warning: submitted in spite of: {problem}")


def run_on_slurm(plan: Sequence[PlannedStep], tell: Tell) -> dict[str, Submission]:
    """Submit what is to run, each step with `afterok` on those before it; returns the jobs of all steps that run or
    wait now. If one is refused, those that were submitted for it are cancelled.

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
                raise _take_back(submitted, planned, error) from error
        tell(_line(planned, jobs.get(planned.name), [each for each in planned.before if each in jobs]))
    return jobs


def dependency(jobs: Sequence[str]) -> str | None:
    """What sbatch is told of the jobs that come first."""
    return f"afterok:{':'.join(jobs)}" if jobs else None


def _take_back(submitted: dict[str, Submission], planned: PlannedStep, error: BaseException) -> RegenError:
    """Cancel what was submitted; what is said of it."""
    cancelled, left = [], []
    for name, job in submitted.items():
        try:
            slurm.cancel(str(job.id()))
            cancelled.append(f"{name} (job {job.id()})")
        except RegenError as problem:
            left.append(f"{name} (job {job.id()}: {problem})")
    what = str(error) or "interrupted; `squeue` tells whether Slurm has it all the same"
    texts = [f"step {planned.name}: {what}"]
    texts += [f"cancelled again: {', '.join(cancelled)}"] if cancelled else []
    texts += [f"could NOT be cancelled, and will run: {', '.join(left)}"] if left else []
    return RegenError("; ".join(texts))


def wait_for_jobs(jobs: dict[str, Submission], tell: Tell) -> int:
    """Wait for the jobs of all steps; returns the first exit code that is not 0."""
    codes = []
    for name, job in jobs.items():
        codes.append(wait_for(job))
        began = any(read_history(task.launch) for task in job.tasks)
        ended = f"ended with exit code {codes[-1]}" if began else "did not run"
        tell(f"{name}: {ended if codes[-1] else 'done'}")
    return next((code for code in codes if code), EXIT_OK)


def run_here(plan: Sequence[PlannedStep], tell: Tell) -> int:
    """Run the steps one after the other on this machine, and wait for each; returns the first exit code that is not 0.

    Ctrl-C and SIGTERM ask the step that runs to save and end. A terminal that is closed leaves it running: the same
    command waits for it, and goes on.
    """
    with _terminated_as_interrupted():
        for planned in plan:
            tell(_line(planned, planned.job, []))
            if planned.state == "complete":
                continue
            job = planned.job if planned.state == "alive" and planned.job else submit(planned.request)
            tell(f"  watch it: regen jobs logs {shlex.quote(str(planned.request.base))} --follow")
            if code := _see_through(planned, job, tell):
                return code
    return EXIT_OK


def _see_through(planned: PlannedStep, job: Submission, tell: Tell) -> int:
    try:
        code = wait_for(job)
    except KeyboardInterrupt:
        tell(f"{planned.name}: told to save and end")
        with suppress(ProcessLookupError):
            os.kill(int(str(job.id())), signal.SIGTERM)
        wait_for(job)
        tell("stopped; the same command goes on")
        return EXIT_RESUME
    if code:
        tell(f"{planned.name} ended with exit code {code}; nothing after it was started")
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


# What `regen submit pipeline --dry-run` prints.

_HEAD = ("step", "after", "what", "state", "nodes x ranks", "tasks", "why")
_SHOWN = 3  # commands of an array


def table(plan: Sequence[PlannedStep]) -> Iterator[str]:
    """A line for every step, under a head."""
    rows = [_HEAD, *map(_row, plan)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _row(planned: PlannedStep) -> tuple[str, ...]:
    request, step = planned.request, planned.step
    what = f"train {step.train}" if step.train else " ".join((step.command or ())[:2])
    size = f"{request.cluster.nodes} x {request.cluster.ranks_per_node if request.distributed else 1}"
    part = f"{len(request.tasks)} of {step.array}" if len(request.tasks) < step.array else str(step.array)
    return planned.name, ", ".join(planned.before) or "-", what, planned.state, size, part, planned.why


def scripts(plan: Sequence[PlannedStep]) -> Iterator[str]:
    """What would be submitted of every step that is to run: its commands, and on Slurm its batch script. What is in
    capitals is given then."""
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
