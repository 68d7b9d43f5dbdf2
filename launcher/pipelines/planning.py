"""Which steps of a pipeline are complete, which are on their way, and which must run."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from launcher.cluster import load_cluster
from launcher.job import JobTask, Submission, newest_job
from launcher.pipelines.schema import Pipeline, Step, missing_outputs, with_inputs
from launcher.retry import is_complete, newest_step, read_history
from launcher.submit import SubmissionRequest, command_request, is_alive, train_request
from regen_dist.config import load_config
from regen_dist.config.files import shown_value
from regen_dist.errors import ConfigError


@dataclass(frozen=True)
class PlannedStep:
    """A step, what it would submit, and what stands in the way of that.

    complete: nothing is left to do. alive: an earlier submission runs or waits (`job`). run: `order`, which may be a
    part of an array, is to be submitted.
    """

    name: str
    step: Step
    before: tuple[str, ...]
    request: SubmissionRequest
    state: Literal["complete", "alive", "run"]
    why: str
    job: Submission | None = None
    problem: str = ""  # why this cannot go on as it is


class Left(NamedTuple):
    """The tasks of a step that are still to be run, and why; or why none is."""

    tasks: Sequence[JobTask]
    why: str


def plan(pipeline: Pipeline, cluster: str, settings: Sequence[str]) -> list[PlannedStep]:
    """Every step, each behind those that it waits for.

    Args:
        pipeline: what to run.
        cluster: name of the place.
        settings: changes to its file, for every step; a step's own come after them.

    Raises:
        ConfigError: with the problems of all steps: a config or a cluster is wrong, or two steps share a folder.
    """
    orders = _orders(pipeline, cluster, settings)
    planned: dict[str, PlannedStep] = {}
    for name in pipeline.ordered:
        before = {each: planned[each] for each in pipeline.before[name]}
        planned[name] = _planned(name, pipeline.steps[name], orders[name], before)
    return list(planned.values())


def _orders(pipeline: Pipeline, cluster: str, settings: Sequence[str]) -> dict[str, SubmissionRequest]:
    orders, problems = {}, []
    for name, step in pipeline.steps.items():
        try:
            orders[name] = _order(pipeline, name, step, cluster, settings)
        except ConfigError as error:
            problems.append(f"step {name}: {error}")
    problems += _shared_folders(orders)
    if problems:
        raise ConfigError("\n".join([f"{pipeline.name}: {len(problems)} step(s) are wrong", *problems]))
    return orders


def _order(pipeline: Pipeline, name: str, step: Step, cluster: str, settings: Sequence[str]) -> SubmissionRequest:
    one_node = [] if step.train else ["nodes=1"]  # a command is one process
    own = [f"{key}={shown_value(value)}" for key, value in step.cluster.items()]
    place = load_cluster(cluster, [*settings, *one_node, *own])
    if step.train is not None:
        return train_request(load_config(step.train, step.overrides), place, cluster)
    job = f"{pipeline.name}.{name}"
    request = command_request(job, pipeline.folder / name, step.command or (), place, cluster, tasks=step.array)
    return with_inputs(request, step.inputs)


def _shared_folders(orders: Mapping[str, SubmissionRequest]) -> list[str]:
    by_folder: dict[Path, list[str]] = {}
    for name, request in orders.items():
        by_folder.setdefault(request.base, []).append(name)
    return [
        f"steps {' and '.join(names)} have one folder, {folder}; give their configs different names"
        for folder, names in by_folder.items()
        if len(names) > 1
    ]


def _planned(name: str, step: Step, request: SubmissionRequest, before: Mapping[str, PlannedStep]) -> PlannedStep:
    names, job = tuple(before), newest_job(request.base)
    if job is not None and is_alive(job):
        why = f"job {job.id()} runs or waits"
        return PlannedStep(name, step, names, request, "alive", why, job, _conflict(job, request, before))
    left = _left_of_training(request, job, before) if request.configs else _left_of_command(request, step, job, before)
    if not left.tasks:
        return PlannedStep(name, step, names, request, "complete", left.why, job)
    part = request if len(left.tasks) == len(request.tasks) else request.part(left.tasks)
    return PlannedStep(name, step, names, part, "run", left.why, job)


def _conflict(job: Submission, request: SubmissionRequest, before: Mapping[str, PlannedStep]) -> str:
    """Why a job that runs or waits is not the one that is wanted; "" where it is."""
    what = f"job {job.id()} ({job.cluster_name}) runs or waits"
    first = f"wait for it, or end it first: regen jobs stop {shlex.quote(str(request.base))}"
    if job.cluster.kind != request.cluster.kind:
        return f"{what}, elsewhere than on {request.cluster_name}; {first}"
    if job.fingerprint != request.fingerprint:
        return f"{what} with another {'config' if request.configs else 'command'} than this one; {first}"
    if again := [name for name, each in before.items() if each.state == "run"]:
        return f"{what}, while {_and(again)} before it must run again; {first}"
    if failed := [task.name for task in job.tasks if _has_failed(task)]:
        return f"{what}, but {_and(failed)} failed, so that what follows would be cancelled; {first}"
    return ""


def _has_failed(task: JobTask) -> bool:
    """Whether a task has ended for good, without being done."""
    history = read_history(task.launch)
    end = history[-1].end if history else None
    return end is not None and not end.again and end.why != "done"


def _left_of_training(request: SubmissionRequest, job: Submission | None, before: Mapping[str, PlannedStep]) -> Left:
    """Told by the checkpoints. Training that is complete is never thrown away because something before it changed."""
    (task,), (config,) = request.tasks, request.configs
    step, steps = newest_step(task.progress), config.train.steps
    if step is None:
        return Left(request.tasks, "how far it is could not be told")
    if step < steps:
        return Left(request.tasks, f"it is at step {step} of {steps}" if step or job else "it has not run yet")
    changes = ["its config has changed"] if job is not None and job.fingerprint != request.fingerprint else []
    changes += [f"{_and(again)} runs before it" for again in [_not_complete(before)] if again]
    changes += [f"{_and(newer)} ran again after it" for newer in [_newer(job, before)] if newer]
    remark = f", though {' and '.join(changes)}: another name in its config trains anew" if changes else ""
    return Left((), f"all {steps} steps are done{remark}")


def _left_of_command(
    request: SubmissionRequest, step: Step, job: Submission | None, before: Mapping[str, PlannedStep]
) -> Left:
    """Told by the histories of its tasks and by its outputs, if they are those of this command and of what is before
    it now."""
    if job is None:
        return Left(request.tasks, "it has not run yet")
    if again := _not_complete(before):
        return Left(request.tasks, f"{_and(again)} runs before it")
    if job.fingerprint != request.fingerprint:
        return Left(request.tasks, "its command or its inputs have changed")
    if newer := _newer(job, before):
        return Left(request.tasks, f"{_and(newer)} ran again after it")
    left = [task for task in request.tasks if not is_complete(read_history(task.launch), step=None, steps=None)]
    gone = missing_outputs(request, step)
    makers = [task for tasks in gone.values() for task in tasks]
    texts = [f"{_tasks(left, request)} not ended well"] if left else []
    texts += [f"{_first(gone)} not there"] if gone else []
    return Left(
        [each for each in request.tasks if each in left or each in makers], "; ".join(texts) or "its output is complete"
    )


def _not_complete(before: Mapping[str, PlannedStep]) -> list[str]:
    return [name for name, each in before.items() if each.state != "complete"]


def _newer(job: Submission | None, before: Mapping[str, PlannedStep]) -> list[str]:
    """Steps that were submitted again later than this one, as when a pipeline was interrupted between them."""
    return [name for name, each in before.items() if job and each.job and each.job.submitted > job.submitted]


def _tasks(left: Sequence[JobTask], request: SubmissionRequest) -> str:
    return "it has" if len(request.tasks) == 1 else f"{len(left)} of {len(request.tasks)} tasks have"


def _first(gone: Mapping[str, object]) -> str:
    more = len(gone) - 1
    return f"{next(iter(gone))} is" if not more else f"{next(iter(gone))} and {more} more are"


def _and(names: Sequence[str]) -> str:
    return " and ".join(names)
