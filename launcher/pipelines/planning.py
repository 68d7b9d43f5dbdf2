"""Which steps of a pipeline are complete, which are on their way, and which must run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from launcher.attempt import newest_step
from launcher.cluster import load_cluster
from launcher.history import read_history
from launcher.job import Task, newest_job
from launcher.pipelines.schema import Pipeline, Step
from launcher.policy import is_complete
from launcher.submitting import Order, command_order, train_order
from launcher.waiting import is_alive
from regen_dist.config import load_config
from regen_dist.config.yamlfile import shown_value
from regen_dist.data.objects.store import Store
from regen_dist.errors import ConfigError, ObjectMissing


@dataclass
class Planned:
    """A step, what it would submit, and what stands in the way of that.

    complete: nothing is left to do. alive: an earlier submission runs or waits (`job`). run: `order` is to be
    submitted.
    """

    name: str
    step: Step
    before: tuple[str, ...]
    order: Order
    state: Literal["complete", "alive", "run"]
    why: str
    job: str | None = field(default=None)


def plan(pipeline: Pipeline, cluster: str, settings: Sequence[str]) -> list[Planned]:
    """Every step, in order.

    Args:
        pipeline: what to run.
        cluster: name of the place.
        settings: changes to its file, for every step; a step's own come after them.

    Raises:
        ConfigError: with the problems of all steps: a config or a cluster is wrong, or two steps share a folder.
    """
    orders, problems = {}, []
    for name, step in pipeline.steps.items():
        try:
            orders[name] = _order(pipeline, name, step, cluster, settings)
        except ConfigError as error:
            problems.append(f"step {name}: {error}")
    problems += _shared_folders(orders)
    if problems:
        raise ConfigError("\n".join([f"{pipeline.name}: {len(problems)} step(s) are wrong", *problems]))
    planned: dict[str, Planned] = {}
    for name, order in orders.items():
        before = pipeline.before(name)
        again = [each for each in before if planned[each].state != "complete"]
        planned[name] = _planned(name, pipeline.steps[name], before, order, again)
    return list(planned.values())


def _order(pipeline: Pipeline, name: str, step: Step, cluster: str, settings: Sequence[str]) -> Order:
    place = load_cluster(cluster, [*settings, *(f"{key}={shown_value(value)}" for key, value in step.cluster.items())])
    if step.train is not None:
        return train_order(load_config(step.train, step.overrides), place, cluster)
    base = Path(pipeline.output) / pipeline.name / name
    return command_order(f"{pipeline.name}.{name}", base, step.command or (), place, cluster, tasks=step.array)


def _shared_folders(orders: dict[str, Order]) -> list[str]:
    by_folder: dict[Path, list[str]] = {}
    for name, order in orders.items():
        by_folder.setdefault(order.base, []).append(name)
    return [
        f"steps {' and '.join(names)} have one folder, {folder}; give their configs different names"
        for folder, names in by_folder.items()
        if len(names) > 1
    ]


def _planned(name: str, step: Step, before: tuple[str, ...], order: Order, again: list[str]) -> Planned:
    job = newest_job(order.base)
    if job is not None and is_alive(job):
        return Planned(name, step, before, order, "alive", f"job {job.id()} runs or waits", job.id())
    if job is None:
        left, why = list(order.tasks), "it has not run yet"
    elif again and not order.configs:
        left, why = list(order.tasks), f"{' and '.join(again)} runs before it"
    elif order.configs:
        left = [task for task in order.tasks if not _done(task)]
        why = "its run has not reached its last step"
    elif job.fingerprint != order.fingerprint:
        left, why = list(order.tasks), "its command has changed"
    else:
        left, why = _left(order, step)
    if not left:
        return Planned(name, step, before, order, "complete", "its output is complete")
    return Planned(name, step, before, order if len(left) == len(order.tasks) else order.part(left), "run", why)


def _left(order: Order, step: Step) -> tuple[list[Task], str]:
    left = [task for task in order.tasks if not _done(task)]
    if left:
        return left, "it has not ended well" if len(order.tasks) == 1 else f"{len(left)} of its tasks are left"
    if gone := [url for url in step.outputs if not exists(url)]:
        return list(order.tasks), f"{gone[0]} is not there"
    return [], ""


def _done(task: Task) -> bool:
    steps = task.progress.steps if task.progress else None
    return is_complete(read_history(task.launch), step=newest_step(task.progress), steps=steps)


def exists(url: str) -> bool:
    """Whether there is an object, a file or a folder with something in it.

    Raises:
        DataError: the store does not answer.
    """
    parent, _, name = url.rstrip("/").rpartition("/")
    if "://" not in url:
        return Path(url).exists()
    try:
        return Store(parent).size(name) is not None or bool(Store(url).list())
    except ObjectMissing:
        return False
