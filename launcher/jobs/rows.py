"""The rows of the table: one for each task, or one for a whole array of many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from launcher.history import read_history
from launcher.job import Progress, Task
from launcher.jobs.figures import QUIET_S, Figures, duration, figures, first_beat, heartbeat_age_s, worry
from launcher.jobs.finding import Found, Member, Run, shown_name
from launcher.jobs.queue import Queue
from launcher.jobs.standing import Standing, State, standing

# Of the states of an array's tasks the first one stands for it.
_ORDER: tuple[State, ...] = ("running", "stopping", "requeued", "pending", "failed", "lost", "stopped", "done")
UNFOLDED = 8  # arrays of more tasks are one row, and one for each task that failed, up to so many


@dataclass(frozen=True)
class Row:
    """What is known of a task, or of an array of many tasks; None for what is not."""

    run: str
    state: State
    note: str = ""
    folder: str = ""
    job: str | None = None
    cluster: str | None = None
    nodes: int | None = None
    ranks_per_node: int | None = None
    restarts: int = 0
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    clips_per_s: float | None = None
    eta_s: float | None = None
    checkpoint_step: int | None = None
    checkpoint_age_s: float | None = None
    heartbeat_age_s: float | None = None
    tasks: dict[str, int] | None = None  # of an array: how many are in each state

    def to_json(self) -> dict[str, Any]:
        """For scripts: every field by its name."""
        return asdict(self)


def rows(found: Found, queue: Queue, root: Path, *, fold: bool = True) -> list[Row]:
    """A row for each task; arrays of many tasks are folded into one, except what has failed."""
    each_plain = [row for folder in found.plain if (row := _plain_row(folder, root)) is not None]
    return [*each_plain, *(row for run in found.runs for row in _run_rows(run, queue, root, fold))]


def _run_rows(run: Run, queue: Queue, root: Path, fold: bool) -> list[Row]:
    if len(run.members) == 1:
        return [task_row(run.members[0], queue, root)]
    if not fold or len(run.members) <= UNFOLDED:
        return [task_row(member, queue, root) for member in run.members]
    all_rows = [task_row(member, queue, root) for member in run.members]
    bad = [row for row in all_rows if row.state in ("failed", "lost")]
    return [_folded(run, all_rows, root), *bad[:UNFOLDED]]


def task_row(member: Member, queue: Queue, root: Path) -> Row:
    """The row of one task."""
    job, task = member.job, member.task
    history = read_history(task.launch)
    known = figures(task, history) if task.progress else Figures()
    steps = task.progress.steps if task.progress else None
    complete = steps is not None and known.saved_step is not None and known.saved_step >= steps
    stands = standing(member, queue, complete=complete)
    row = Row(
        run=shown_name(task.folder, root), state=stands.state, note=stands.note, folder=str(task.folder),
        job=member.queue_id, cluster=job.cluster_name, nodes=job.cluster.nodes,
        ranks_per_node=job.cluster.ranks_per_node if job.distributed else 1, restarts=max(len(history) - 1, 0),
    )  # fmt: skip
    if task.progress:
        row = _with_figures(row, known, task.progress)
    began = history[-1].start.time if history else None
    return _with_heartbeat(row, task, began) if task.progress and began else row


def _with_figures(row: Row, known: Figures, progress: Progress) -> Row:
    """Speed and the time that is left are those of a run that runs."""
    runs = row.state in ("running", "stopping")
    left_s = None
    if runs and known.step_s is not None and known.step is not None:
        left_s = max(progress.steps - known.step, 0) * known.step_s
    return replace(
        row, step=known.step, steps=progress.steps, loss=known.loss, eta_s=left_s,
        clips_per_s=known.clips_per_s if runs else None,
        checkpoint_step=known.saved_step, checkpoint_age_s=known.saved_age_s,
    )  # fmt: skip


def _with_heartbeat(row: Row, task: Task, began: float) -> Row:
    if row.state not in ("running", "stopping"):
        return row
    doubt = worry(task.folder, began)
    note = "; ".join(filter(None, [row.note, doubt]))
    return replace(row, note=note, heartbeat_age_s=heartbeat_age_s(task.folder, began))


def _folded(run: Run, all_rows: Sequence[Row], root: Path) -> Row:
    counts = Counter(row.state for row in all_rows)
    told = ", ".join(f"{counts[state]} {state}" for state in _ORDER if counts[state])
    first = next(state for state in _ORDER if counts[state])
    newest = max(run.members, key=lambda member: member.job.submitted).job
    return Row(
        run=shown_name(run.folder, root),
        state=first,
        note=f"{len(all_rows)} tasks: {told}",
        folder=str(run.folder),
        job=newest.id(),
        cluster=newest.cluster_name,
        nodes=newest.cluster.nodes,
        ranks_per_node=all_rows[0].ranks_per_node,
        restarts=sum(row.restarts for row in all_rows),
        tasks={str(state): count for state, count in counts.items()},
    )


def _plain_row(folder: Path, root: Path) -> Row | None:
    """A run that `regen train` was called for; None where it left no readable heartbeat."""
    beat, age_s = first_beat(folder), heartbeat_age_s(folder)
    if beat is None or age_s is None:
        return None
    steps = _steps(folder)
    task = Task(
        name=folder.name, folder=folder, command=(),
        progress=Progress(checkpoints=str(folder / "checkpoints"), steps=steps or 1),
    )  # fmt: skip
    known = figures(task, ())
    stands = _by_beat(beat.left, beat.why, age_s, finished=steps is not None and (known.step or 0) >= steps)
    row = Row(
        run=shown_name(folder, root), state=stands.state, note=stands.note, folder=str(folder),
        heartbeat_age_s=age_s if stands.active else None,
    )  # fmt: skip
    shown = _with_figures(row, known, task.progress) if task.progress else row
    return shown if steps else replace(shown, steps=None, eta_s=None)


def _by_beat(left: str, why: str, age_s: float, *, finished: bool) -> Standing:
    if why:
        return Standing("failed", why.splitlines()[0])
    if left:
        return Standing("done" if finished else "stopped")
    return Standing("running") if age_s <= QUIET_S else Standing("lost", f"no heartbeat for {duration(age_s)}")


def _steps(folder: Path) -> int | None:
    try:
        return int(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["train"]["steps"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return None
