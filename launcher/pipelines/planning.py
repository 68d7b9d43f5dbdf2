"""Plan of a pipeline: steps that are complete, running, or to be run."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from launcher.attempts import attempts_since, read_history
from launcher.cluster import load_cluster
from launcher.job import JobTask, Submission, newest_job
from launcher.pipelines.schema import Pipeline, PipelineStep, missing_outputs, with_inputs
from launcher.retry import is_complete, newest_step
from launcher.submit import SubmissionRequest, command_request, is_alive, train_request
from regen_dist.config import load_config
from regen_dist.config.yaml_files import shown_value
from regen_dist.errors import ConfigError

_NAMED = 3  # tasks that a message names


@dataclass(frozen=True)
class PlannedStep:
    """A step, the request it would submit, and a problem that prevents that.

    complete: nothing is left to do. alive: an earlier submission (`job`) runs or waits. run: `request`, which may be
    part of an array, is to be submitted.
    """

    name: str
    step: PipelineStep
    before: tuple[str, ...]
    request: SubmissionRequest
    state: Literal["complete", "alive", "run"]
    why: str
    job: Submission | None = None
    problem: str = ""  # why the step cannot proceed


class Remaining(NamedTuple):
    """Tasks of a step that are still to be run, and the reason; or the reason why there are none."""

    tasks: Sequence[JobTask]
    why: str


def plan(pipeline: Pipeline, cluster: str, settings: Sequence[str]) -> list[PlannedStep]:
    """Return every step, each after its predecessors.

    Args:
        pipeline: pipeline to run.
        cluster: name of the cluster.
        settings: cluster overrides for every step; a step's own overrides follow them.

    Raises:
        ConfigError: lists the problems of all steps: an invalid config or cluster, or two steps with one folder.
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


def _order(
    pipeline: Pipeline, name: str, step: PipelineStep, cluster: str, settings: Sequence[str]
) -> SubmissionRequest:
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


def _planned(
    name: str, step: PipelineStep, request: SubmissionRequest, before: Mapping[str, PlannedStep]
) -> PlannedStep:
    names, job = tuple(before), newest_job(request.base)
    if job is not None and is_alive(job):
        why = f"job {job.id()} runs or waits"
        return PlannedStep(name, step, names, request, "alive", why, job, _conflict_text(job, request, before))
    left = (
        _remaining_training(request, job, before) if request.configs else _remaining_command(request, step, job, before)
    )
    if not left.tasks:
        return PlannedStep(name, step, names, request, "complete", left.why, job)
    part = request if len(left.tasks) == len(request.tasks) else request.part(left.tasks)
    return PlannedStep(name, step, names, part, "run", left.why, job)


def _conflict_text(job: Submission, request: SubmissionRequest, before: Mapping[str, PlannedStep]) -> str:
    """Return why a running or pending job is not the wanted one; "" if it is."""
    what = f"job {job.id()} ({job.cluster_name}) runs or waits"
    first = f"wait for it, or end it first: regen jobs stop {shlex.quote(str(request.base))}"
    if job.cluster.kind != request.cluster.kind:
        return f"{what}, elsewhere than on {request.cluster_name}; {first}"
    if job.fingerprint != request.fingerprint:
        return f"{what} with another {'config' if request.configs else 'command'} than this one; {first}"
    if again := [name for name, each in before.items() if each.state == "run"]:
        return f"{what}, while {_joined(again)} before it must run again; {first}"
    if failed := [task.name for task in job.tasks if _has_failed(job, task)]:
        return f"{what}, but {_joined(failed)} failed, so that what follows would be cancelled; {first}"
    own = {task.folder for task in job.tasks}  # it may be a part of an array that was resumed
    others = [] if request.configs else [task for task in request.tasks if task.folder not in own]
    if left := [each.name for each in others if not is_complete(read_history(each.launch), step=None, steps=None)]:
        return f"{what}, without {_joined(left[:_NAMED])}, which must end well before what follows; {first}"
    return ""


def _has_failed(job: Submission, task: JobTask) -> bool:
    """Return whether a task has ended unsuccessfully since the job was submitted."""
    history = attempts_since(read_history(task.launch), job.submitted)
    end = history[-1].end if history else None
    return end is not None and not end.again and end.why != "done"


def _remaining_training(
    request: SubmissionRequest, job: Submission | None, before: Mapping[str, PlannedStep]
) -> Remaining:
    """Return the tasks that remain by their checkpoints. Complete training is never discarded because of other
    changes."""
    (task,), (config,) = request.tasks, request.configs
    step, steps = newest_step(task.progress), config.train.steps
    if step is None:
        return Remaining(request.tasks, "its progress could not be determined")
    if step < steps:
        return Remaining(request.tasks, f"it is at step {step} of {steps}" if step or job else "it has not run yet")
    changes = ["its config has changed"] if job is not None and job.fingerprint != request.fingerprint else []
    changes += [f"{_joined(again)} runs before it" for again in [_incomplete_predecessors(before)] if again]
    changes += [f"{_joined(newer)} ran again after it" for newer in [_newer_predecessors(job, before)] if newer]
    remark = f", though {' and '.join(changes)}: another name in its config trains anew" if changes else ""
    return Remaining((), f"all {steps} steps are done{remark}")


def _remaining_command(
    request: SubmissionRequest, step: PipelineStep, job: Submission | None, before: Mapping[str, PlannedStep]
) -> Remaining:
    """Return the tasks that remain by their histories and outputs, if these belong to this command and to the current
    predecessors."""
    if job is None:
        return Remaining(request.tasks, "it has not run yet")
    if again := _incomplete_predecessors(before):
        return Remaining(request.tasks, f"{_joined(again)} runs before it")
    if job.fingerprint != request.fingerprint:
        return Remaining(request.tasks, "its command or its inputs have changed")
    if newer := _newer_predecessors(job, before):
        return Remaining(request.tasks, f"{_joined(newer)} ran again after it")
    left = [task for task in request.tasks if not is_complete(read_history(task.launch), step=None, steps=None)]
    gone = missing_outputs(request, step)
    makers = [task for tasks in gone.values() for task in tasks]
    texts = [f"{_tasks(left, request)} not ended well"] if left else []
    texts += [f"{_first(gone)} not there"] if gone else []
    return Remaining(
        [each for each in request.tasks if each in left or each in makers], "; ".join(texts) or "its output is complete"
    )


def _incomplete_predecessors(before: Mapping[str, PlannedStep]) -> list[str]:
    return [name for name, each in before.items() if each.state != "complete"]


def _newer_predecessors(job: Submission | None, before: Mapping[str, PlannedStep]) -> list[str]:
    """Return the predecessors that were submitted after this step, as after an interrupted pipeline."""
    return [name for name, each in before.items() if job and each.job and each.job.submitted > job.submitted]


def _tasks(left: Sequence[JobTask], request: SubmissionRequest) -> str:
    return "it has" if len(request.tasks) == 1 else f"{len(left)} of {len(request.tasks)} tasks have"


def _first(gone: Mapping[str, object]) -> str:
    more = len(gone) - 1
    return f"{next(iter(gone))} is" if not more else f"{next(iter(gone))} and {more} more are"


def _joined(names: Sequence[str]) -> str:
    return " and ".join(names)
