"""`regen jobs resume`: the newest submission again, or what is left of it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path

from launcher.attempt import newest_step
from launcher.cluster import ClusterConfig, load_cluster
from launcher.history import read_history
from launcher.job import LAUNCH, Job, Task, new_folder
from launcher.jobs.finding import Member, shown_name
from launcher.jobs.queue import ask
from launcher.jobs.standing import Standing, standing
from launcher.policy import is_complete
from launcher.snapshot import take_snapshot
from launcher.submitting import Order, hand_over
from regen_dist.config import load_config
from regen_dist.config.loading import load_section
from regen_dist.config.section import Section
from regen_dist.errors import ConfigError, RegenError


def left_to_do(members: Sequence[Member], root: Path, *, force: bool = False) -> list[Member]:
    """The tasks that have ended without being complete.

    Args:
        force: where Slurm does not answer, believe the histories; and take what has never said its last word for ended.

    Raises:
        ConfigError: there are none: they run, or are complete.
        BackendError: Slurm does not answer.
    """
    queue = ask(members, must=not force)
    stands = {each: standing(each, queue) for each in members}
    idle = [each for each in members if not stands[each].active or (force and queue.told(each) is None)]
    if found := [each for each in idle if not _complete(each.task)]:
        return found
    raise ConfigError(_refusal(stands, root))


def _refusal(stands: dict[Member, Standing], root: Path) -> str:
    active = [each for each, stand in stands.items() if stand.active]
    if not active:
        names = sorted({shown_name(each.base, root) for each in stands})
        return f"{', '.join(names)}: nothing is left to do, all is complete; for more steps submit it again with them"
    first = active[0]
    name, state = shown_name(first.task.folder, root), stands[first].state
    more = f" (and {len(active) - 1} more)" if len(active) > 1 else ""
    return (
        f"{name}{more}: cannot be resumed while it is {state}, as job {first.queue_id}; `regen jobs stop {name}` first"
    )


def _complete(task: Task) -> bool:
    step = newest_step(task.progress)
    return is_complete(read_history(task.launch), step=step, steps=task.progress.steps if task.progress else None)


def changed_cluster(job: Job, name: str | None, overrides: Sequence[str]) -> tuple[ClusterConfig, str]:
    """Where it shall run now: where it ran, or the cluster `name`, with what the command line changes.

    Raises:
        ConfigError: an override is wrong, or there is no such cluster.
    """
    if name is not None:
        return load_cluster(name, overrides), name
    if not overrides:
        return job.cluster, job.cluster_name
    with tempfile.TemporaryDirectory() as folder:  # overrides are laid over files
        path = Path(folder) / f"{job.cluster_name.replace('/', '_')}.yaml"
        path.write_text(_to_yaml(job.cluster), encoding="utf-8")
        try:
            return load_section(ClusterConfig, path, overrides), job.cluster_name
        except ConfigError as error:
            raise ConfigError(str(error).replace(str(path), f"the cluster of {job.name}")) from None


def _to_yaml(section: Section) -> str:
    """Any section of a config as YAML."""
    import yaml

    return str(yaml.safe_dump(section.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def order_again(members: Sequence[Member], cluster: str | None, overrides: Sequence[str]) -> tuple[Job, Order]:
    """What to submit: the newest job that has some of the tasks, and an order of these tasks alone.

    Raises:
        ConfigError: they are of several folders; or the cluster, or the config of a run, is wrong.
    """
    by_base: dict[Path, list[Member]] = {}
    for member in members:
        by_base.setdefault(member.base, []).append(member)
    if len(by_base) > 1:
        names = ", ".join(base.name for base in by_base)
        raise ConfigError(
            f"{names}: these are jobs of their own, of which one may wait for another; resume one of them, or give "
            "`regen submit pipeline` again, which runs the steps that are left in their order"
        )
    job = max((each.job for each in members), key=lambda each: each.submitted)
    place, name = changed_cluster(job, cluster, overrides)
    tasks = tuple(each.task for each in members)
    with chdir(job.workdir):
        configs = tuple(load_config(task.launch / "config.yaml") for task in tasks) if job.distributed else ()
    return job, Order(job.name, job.kind, members[0].base, tasks, place, name, configs)


def resubmit(job: Job, order: Order, *, new_code: bool = False) -> Job:
    """Submit an order of tasks of `job`: from the folder it was submitted from, with its code or a new copy.

    Raises:
        RegenError: its code is gone, or as of `launcher.submitting.submit`.
    """
    code = take_snapshot(order.base / LAUNCH / "code") if new_code else job.code
    if not code.is_dir():
        raise RegenError(f"{code}: the copy of the code is gone; --new-code takes one of the code that is installed")
    changes = {
        "cluster": order.cluster, "cluster_name": order.cluster_name, "tasks": order.tasks,
        "folder": new_folder(order.base), "code": code, "submitted": time.time(),
    }  # fmt: skip
    return hand_over(job.model_copy(update=changes))
