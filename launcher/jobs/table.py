"""`regen jobs`: the table of jobs and their figures."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from launcher.attempts import Attempt, read_history
from launcher.job import JobTask, TaskProgress
from launcher.jobs.find import (
    FoundJobs,
    JobState,
    Member,
    Queue,
    State,
    SubmittedRun,
    find_jobs,
    job_state,
    query_queue,
    shown_name,
)
from regen_dist.errors import ConfigError
from regen_dist.jsontext import json_text
from regen_dist.observe.heartbeat import Beat, beat_path, parse_beat, read_text
from regen_dist.tables import Column, Table, numbers

if TYPE_CHECKING:
    from rich.console import Console


# Progress of a run, read from the ends of its files: a record may have gigabytes.

TAIL_BYTES, LONG_TAIL_BYTES = 64 * 2**10, 2**20
QUIET_S = 60.0  # heartbeats are written every few seconds
_STANDS_S = 60.0  # longer than a normal step; a longer phase is reported, but may be legitimate
_SPEED_LINES = 50


class RunFigures(NamedTuple):
    """Figures of a training run; None if unknown."""

    step: int | None = None
    loss: float | None = None
    clips_per_s: float | None = None
    step_s: float | None = None  # including saves and validation, over the newest lines
    saved_step: int | None = None
    saved_age_s: float | None = None


def run_figures(task: JobTask, history: Sequence[Attempt]) -> RunFigures:
    """Return the figures of a training task.

    Args:
        history: all its starts.
    """
    lines = read_tail(task.folder / "metrics.jsonl")
    trained = [line for line in lines if line.get("kind") == "train"]
    last = trained[-1] if trained else {}
    started = history[-1].start if history else None
    now = [line for line in trained if started is None or line["time"] >= started.time]
    saved_step, saved_at = _saved(task, lines)
    known = [step for step in (last.get("step"), saved_step, started.step if started else None) if step is not None]
    return RunFigures(
        step=last.get("step") if now else max(known, default=None),
        loss=last.get("loss"),
        clips_per_s=now[-1].get("clips_per_s") if now else None,
        step_s=_pace(now[-_SPEED_LINES:]),
        saved_step=saved_step if saved_step is not None else (started.step or None if started else None),
        saved_age_s=None if saved_at is None else max(time.time() - saved_at, 0.0),
    )


def read_tail(path: Path) -> list[dict[str, Any]]:
    """Return the newest lines of a record, oldest first; empty if there is none."""
    return list(_parsed(read_end(path, TAIL_BYTES).splitlines()))


def read_end(path: Path, size: int) -> str:
    """Return the last `size` bytes of a file without the first, partial line; "" if there is no file."""
    try:
        with path.open("rb") as file:
            length = file.seek(0, os.SEEK_END)
            file.seek(max(length - size - 1, 0))
            found = file.read()
    except FileNotFoundError:
        return ""
    return (found.partition(b"\n")[2] if length > size else found).decode("utf-8", "replace")


def _parsed(lines: Sequence[str]) -> Iterator[dict[str, Any]]:
    for text in lines:
        try:
            line = json.loads(text)
        except ValueError:  # truncated by a crash
            continue
        if isinstance(line, dict) and {"kind", "step", "time"} <= line.keys():
            yield line


def _pace(lines: Sequence[dict[str, Any]]) -> float | None:
    """Return the seconds per step."""
    if len(lines) < 2 or lines[-1]["step"] <= lines[0]["step"]:
        return lines[-1].get("step_s") if lines else None
    return float((lines[-1]["time"] - lines[0]["time"]) / (lines[-1]["step"] - lines[0]["step"]))


def _saved(task: JobTask, lines: Sequence[dict[str, Any]]) -> tuple[int | None, float | None]:
    """Return step and time of the newest checkpoint: from the pointer if it is a local file, otherwise from the record,
    since the table of many runs must not wait for many stores."""
    if task.progress and "://" not in task.progress.checkpoints:
        pointer = Path(task.progress.checkpoints) / "latest"
        try:
            return int(pointer.read_text(encoding="utf-8").strip().removeprefix("step-")), pointer.stat().st_mtime
        except (OSError, ValueError):
            return None, None
    saved = _saves(lines)
    if not saved:
        longer = read_end(task.folder / "metrics.jsonl", LONG_TAIL_BYTES).splitlines()
        saved = _saves(_parsed([line for line in longer if '"checkpoint"' in line]))
    return (saved[-1]["step"], saved[-1]["time"]) if saved else (None, None)


def _saves(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if line["kind"] == "checkpoint" and not line.get("problem")]


def heartbeat_age_s(run: Path, since: float = 0.0) -> float | None:
    """Return the seconds since any rank wrote its heartbeat; None if none did after `since`."""
    try:
        with os.scandir(run / "heartbeats") as entries:
            times = [each.stat().st_mtime for each in entries if each.name.endswith(".json")]
    except OSError:
        return None
    newest = max(times, default=0.0)
    return max(time.time() - newest, 0.0) if newest > since else None


def newest_heartbeat(run: Path) -> Beat | None:
    """Return the newest heartbeat of rank 0."""
    return parse_beat(read_text(beat_path(run, 0)))


def heartbeat_warning(run: Path, since: float) -> str:
    """Return a warning about the heartbeats of a running start, or ""."""
    age_s = heartbeat_age_s(run, since)
    if age_s is None:
        late_s = time.time() - since
        return f"no heartbeat since it started {duration(late_s)} ago" if late_s > 2 * QUIET_S else ""
    if age_s > QUIET_S:
        return f"no heartbeat for {duration(age_s)}"
    beat = newest_heartbeat(run)
    if beat and not beat.left and beat.stood_s > _STANDS_S:
        return f"rank 0 is in '{beat.phase}' for {duration(beat.stood_s)}"
    return ""


def duration(seconds: float) -> str:
    """Format a duration briefly: 45s, 12m, 3h05, 2d7h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}"
    return f"{whole // 86400}d{whole % 86400 // 3600}h"


# Rows of the table: one per task, or one for a large array.

# The first of these states that occurs in an array is the state of the array.
_ORDER: tuple[State, ...] = ("running", "stopping", "requeued", "pending", "failed", "lost", "stopped", "done")
UNFOLDED = 8  # larger arrays are one row, plus one per failed task, up to this number


@dataclass(frozen=True)
class JobRow:
    """Facts of a task or of a large array; None if unknown."""

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
    tasks: dict[str, int] | None = None  # arrays: number of tasks in each state


def rows(found: FoundJobs, queue: Queue, root: Path, *, fold: bool = True) -> list[JobRow]:
    """Return one row per task; large arrays are folded into one row, except failed tasks."""
    each_plain = [row for folder in found.plain if (row := _plain_row(folder, root)) is not None]
    return [*each_plain, *(row for run in found.runs for row in _run_rows(run, queue, root, fold))]


def _run_rows(run: SubmittedRun, queue: Queue, root: Path, fold: bool) -> list[JobRow]:
    if len(run.members) == 1:
        return [task_row(run.members[0], queue, root)]
    if not fold or len(run.members) <= UNFOLDED:
        return [task_row(member, queue, root) for member in run.members]
    all_rows = [task_row(member, queue, root) for member in run.members]
    bad = [row for row in all_rows if row.state in ("failed", "lost")]
    return [_folded(run, all_rows, root), *bad[:UNFOLDED]]


def task_row(member: Member, queue: Queue, root: Path) -> JobRow:
    """Return the row of a task."""
    job, task = member.job, member.task
    history = read_history(task.launch)
    known = run_figures(task, history) if task.progress else RunFigures()
    steps = task.progress.steps if task.progress else None
    complete = steps is not None and known.saved_step is not None and known.saved_step >= steps
    state = job_state(member, queue, complete=complete)
    row = JobRow(
        run=shown_name(task.folder, root), state=state.state, note=state.note, folder=str(task.folder),
        job=member.queue_id, cluster=job.cluster_name, nodes=job.cluster.nodes,
        ranks_per_node=job.cluster.ranks_per_node if job.distributed else 1, restarts=max(len(history) - 1, 0),
    )  # fmt: skip
    if task.progress:
        row = _with_figures(row, known, task.progress)
    began = history[-1].start.time if history else None
    return _with_heartbeat(row, task, began) if task.progress and began else row


def _with_figures(row: JobRow, known: RunFigures, progress: TaskProgress) -> JobRow:
    """Add the figures; speed and remaining time only while the run is running."""
    runs = row.state in ("running", "stopping")
    left_s = None
    if runs and known.step_s is not None and known.step is not None:
        left_s = max(progress.steps - known.step, 0) * known.step_s
    return replace(
        row, step=known.step, steps=progress.steps, loss=known.loss, eta_s=left_s,
        clips_per_s=known.clips_per_s if runs else None,
        checkpoint_step=known.saved_step, checkpoint_age_s=known.saved_age_s,
    )  # fmt: skip


def _with_heartbeat(row: JobRow, task: JobTask, began: float) -> JobRow:
    if row.state not in ("running", "stopping"):
        return row
    doubt = heartbeat_warning(task.folder, began)
    note = "; ".join(filter(None, [row.note, doubt]))
    return replace(row, note=note, heartbeat_age_s=heartbeat_age_s(task.folder, began))


def _folded(run: SubmittedRun, all_rows: Sequence[JobRow], root: Path) -> JobRow:
    counts = Counter(row.state for row in all_rows)
    summary = ", ".join(f"{counts[state]} {state}" for state in _ORDER if counts[state])
    first = next(state for state in _ORDER if counts[state])
    newest = max(run.members, key=lambda member: member.job.submitted).job
    return JobRow(
        run=shown_name(run.folder, root),
        state=first,
        note=f"{len(all_rows)} tasks: {summary}",
        folder=str(run.folder),
        job=newest.id(),
        cluster=newest.cluster_name,
        nodes=newest.cluster.nodes,
        ranks_per_node=all_rows[0].ranks_per_node,
        restarts=sum(row.restarts for row in all_rows),
        tasks={str(state): count for state, count in counts.items()},
    )


def _plain_row(folder: Path, root: Path) -> JobRow | None:
    """Return the row of a run started by `regen train`; None without a readable heartbeat."""
    beat, age_s = newest_heartbeat(folder), heartbeat_age_s(folder)
    if beat is None or age_s is None:
        return None
    steps, checkpoints = _steps_and_checkpoints(folder)
    progress = TaskProgress(checkpoints=checkpoints, steps=steps or 1)
    task = JobTask(name=folder.name, folder=folder, command=(), progress=progress)
    known = run_figures(task, ())
    state = _state_by_heartbeat(beat.left, beat.why, age_s, finished=steps is not None and (known.step or 0) >= steps)
    row = JobRow(
        run=shown_name(folder, root), state=state.state, note=state.note, folder=str(folder),
        heartbeat_age_s=age_s if state.active else None,
    )  # fmt: skip
    result = _with_figures(row, known, progress)
    return result if steps else replace(result, steps=None, eta_s=None)


def _state_by_heartbeat(left: str, why: str, age_s: float, *, finished: bool) -> JobState:
    if why:
        return JobState("failed", why.splitlines()[0])
    if left:
        return JobState("done" if finished else "stopped")
    return JobState("running") if age_s <= QUIET_S else JobState("lost", f"no heartbeat for {duration(age_s)}")


def _steps_and_checkpoints(folder: Path) -> tuple[int | None, str]:
    """Return what the config in a run folder says, which may be of another version."""
    own = str(folder / "checkpoints")
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        url = config.get("checkpoint", {}).get("url")
        return int(config["train"]["steps"]), own if url is None else f"{url.rstrip('/')}/{config['name']}"
    except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError):
        return None, own


_WIDE = 130  # minimum width in columns at which notes and job ids get their own columns
_COLOURS = {"running": "green", "stopping": "yellow", "requeued": "yellow", "failed": "red", "lost": "red"}
_NUMBERS = ("size", "again", "step", "loss", "clips/s", "ETA", "saved")


def print_rows(console: Console, rows: Sequence[JobRow]) -> None:
    """Print the table; if it is narrow, notes are printed below it."""
    wide = console.width >= _WIDE
    _table(rows, wide).show(console)
    for row in rows if not wide else ():
        if row.note:
            console.print(f"{row.run}: {row.note}", highlight=False, markup=False, soft_wrap=True)


def _table(rows: Sequence[JobRow], wide: bool) -> Table:
    columns = [Column("run", min_width=8), Column("state", fixed=True), *numbers(*_NUMBERS, fixed=True)]
    cells = [[row.run, row.state, *_numbers(row, wide)] for row in rows]
    if wide:
        columns = [columns[0], Column("job", fixed=True), *columns[1:], Column()]
        cells = [[run, row.job or "", *rest, row.note] for row, (run, *rest) in zip(rows, cells, strict=True)]
    state = [column.name for column in columns].index("state")
    styles = {(number, state): _COLOURS.get(row.state, "") for number, row in enumerate(rows)}
    return Table(columns, cells, cell_styles=styles, frame="light" if wide else "tight")  # fits in 80 columns


def _numbers(row: JobRow, wide: bool) -> list[str]:
    step = "" if row.step is None else f"{row.step}/{row.steps}" if row.steps else f"{row.step}"
    return [
        f"{row.nodes}x{row.ranks_per_node}" if row.nodes else "",
        f"{row.restarts}" if row.restarts else "",
        step,
        "" if row.loss is None else f"{row.loss:.4g}",
        "" if row.clips_per_s is None else f"{row.clips_per_s:.4g}",
        "" if row.eta_s is None else duration(row.eta_s),
        _table_saved(row, wide),
    ]


def _table_saved(row: JobRow, wide: bool) -> str:
    if row.checkpoint_step is None:
        return ""
    if row.checkpoint_age_s is None:
        return f"{row.checkpoint_step}"
    age = duration(row.checkpoint_age_s)
    return f"{row.checkpoint_step}, {age} ago" if wide else f"{row.checkpoint_step} {age}"


# `regen jobs`: the table, once or repeatedly.


def list_jobs(root: Path, *, fold: bool = True) -> tuple[list[JobRow], list[str]]:
    """Return the rows of every run under `root`, and the problems met.

    Raises:
        ConfigError: the folder does not exist.
    """
    if not root.is_dir():
        raise ConfigError(f"{root}: no such folder; give the one that holds the runs by --root")
    found = find_jobs(root)
    queue = query_queue([member for run in found.runs for member in run.members])
    problems = [f"left out: {text}" for text in found.unread]
    if queue.no_answer:
        text = f"Slurm does not answer ({queue.no_answer}): the states of its jobs are taken from their histories"
        problems.insert(0, text)
    return rows(found, queue, root, fold=fold), problems


def show(root: Path, *, as_json: bool, fold: bool, every_s: float | None) -> None:
    """Print the table; with `every_s`, repeat until Ctrl-C."""
    from rich.console import Console

    console = Console()
    while True:
        found, problems = list_jobs(root, fold=fold and not as_json)
        if every_s is not None and console.is_terminal and not as_json:
            console.clear()
        if as_json:
            print(json_text({"runs": list(map(asdict, found)), "problems": problems}, indent=1), flush=True)
        elif found:
            print_rows(console, found)
        else:
            console.print(f"no runs in {root}; `regen submit train CONFIG` starts one", highlight=False, markup=False)
        for problem in () if as_json else problems:
            console.print(f"note: {problem}", highlight=False, markup=False, soft_wrap=True)
        if every_s is None:
            return
        time.sleep(every_s)
