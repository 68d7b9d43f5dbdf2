"""The first and the last word on every start of a task, said by its batch script:

    python -m launcher.attempt begin FOLDER      may it go? 0: yes; 100: nothing is left to do; else: end with this code
    python -m launcher.attempt end FOLDER CODE   what now? requeues the job, or ends with the code of its ranks

One process decides, where there would be hundreds. On this machine `launcher.task` asks the same functions. Runs before
any rank, so it imports no torch.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher import ends, slurm
from launcher.history import Attempt, End, Start, Why, now, read_history, write_entry
from launcher.job import Job, Progress, Task, read_job
from launcher.places import Scheduler, SlurmPlace
from launcher.policy import Verdict, bad_nodes, judge_end, judge_start, overall_code
from regen_dist.checkpoint.manifest import parse_manifest
from regen_dist.data.objects.store import Store
from regen_dist.errors import (
    EXIT_OK,
    EXIT_RESUME,
    BackendError,
    CheckpointError,
    DataError,
    HangError,
    ObjectMissing,
    RegenError,
)
from regen_dist.observe.streams import shield_streams

NOTHING_TO_DO = 100


def begin(job: Job, task: Task, place: Scheduler) -> Verdict:
    """Note that a task starts, unless it is done, was asked to stop, or gets nowhere."""
    history = read_history(task.launch)
    if history and history[-1].end is None:
        _note_lost_start(task, place, history[-1].start)
        history = read_history(task.launch)
    step = newest_step(task.progress)
    steps = task.progress.steps if task.progress else None
    stop, retry = task.stop_file.exists(), job.cluster.retry
    verdict = judge_start(history, step=step, steps=steps, stop=stop, retry=retry, since=job.submitted)
    if verdict.go:
        start = Start(job=place.job, restart=place.restart, nodes=place.nodes, step=step, time=now())
        _note(task, start)
        ends.prune(task.launch)
    elif history and history[-1].end and history[-1].end.again:  # it was to go on, and does not
        why: Why = "done" if not verdict.code else "stopped" if stop else "failed"
        _note(task, End(why=why, code=verdict.code, text=verdict.text, again=False, time=now()))
    return verdict


def _note(task: Task, entry: Start | End) -> None:
    """Put it into the history; what a disk does not take is said, and the task goes on."""
    try:
        write_entry(task.launch, entry)
    except OSError as error:
        say(f"warning: {task.name}: this {entry.kind} is missing in the history: {error}")


def _note_lost_start(task: Task, place: Scheduler, start: Start) -> None:
    """The last start left no word of its end: its node is down, or Slurm ended it before it could save."""
    lost = place.lost([node for node in start.nodes if node not in place.nodes])
    text = f"{', '.join(lost)} went down" if lost else "it was cut off before it could save, or its node was"
    why: Why = "node lost" if lost else "unknown"
    _note(task, End(why=why, code=EXIT_RESUME, text=text, again=True, at_fault=lost, time=now()))


def end(job: Job, task: Task, place: Scheduler, srun_code: int) -> Verdict:
    """Note how a start ended, and decide whether the task goes on.

    Args:
        srun_code: of the program that ran the ranks.
    """
    history = read_history(task.launch)
    if unknown := not history or not _is_of(history[-1].start, place):  # the disk did not take the start
        start = Start(job=place.job, restart=place.restart, nodes=place.nodes, time=now())
        history = [*history, Attempt(start, None)]
    found = ends.read(task.launch, place.job, place.restart, job.world_size)
    code = overall_code([each.code if each else None for each in found], srun_code)
    why = _why(job, task, place, code)
    at_fault = _at_fault(task, code, found, place) if why == "failed" else ()
    step = newest_step(task.progress)
    verdict = judge_end(history, code=code, why=why, step=step, retry=job.cluster.retry, since=job.submitted)
    if unknown and verdict.go:  # without a history nobody counts the starts
        text = f"{verdict.text}; not started again, for its history cannot be written"
        verdict = Verdict(False, text, code)
    text = f"{verdict.text}{_who(code, found)}"
    entry = End(why=why, code=code, text=text, again=verdict.go, at_fault=at_fault, time=now())
    _note(task, entry)
    return verdict._replace(text=text)


def _is_of(start: Start, place: Scheduler) -> bool:
    return (start.job, start.restart) == (place.job, place.restart)


def _why(job: Job, task: Task, place: Scheduler, code: int) -> Why:
    if code == EXIT_OK:
        return "done"
    if task.stop_file.exists():
        return "stopped"
    return place.why_stopped(job) if code == EXIT_RESUME else "failed"


def _at_fault(task: Task, code: int, found: Sequence[ends.RankEnd | None], place: Scheduler) -> tuple[str, ...]:
    """The node on which the first rank failed, in a way that may be the node's doing: killed, hung, or an error that
    is none of ours. Nodes that are down are at fault before any rank."""
    if down := place.lost(place.nodes):
        return down
    if code == HangError.exit_code and (hosts := ends.hung_hosts(task.folder)):
        return tuple(sorted(hosts & set(place.nodes)))
    failed = [each for each in found if each and each.code not in (EXIT_OK, EXIT_RESUME)]
    by_node = failed and (failed[0].code >= 128 or failed[0].code in (1, HangError.exit_code))
    return (failed[0].node,) if by_node else ()


def _who(code: int, found: Sequence[ends.RankEnd | None]) -> str:
    failed = [each for each in found if each and each.code == code]
    if code in (EXIT_OK, EXIT_RESUME) or not failed:
        return ""
    return f" (rank {failed[0].rank} on {failed[0].node}, exit code {code})"


def newest_step(progress: Progress | None) -> int | None:
    """The step of the newest committed checkpoint, 0 where there is none; None for a task without, or where the store
    does not answer. Steps that were skipped at its end do not count: they have trained nothing."""
    if progress is None:
        return None
    try:
        store = Store(progress.checkpoints)
        name = store.get("latest").decode().strip()
        return int(name.removeprefix("step-")) - _skipped_at_the_end(store, name)
    except ObjectMissing:
        return 0
    except (DataError, ValueError) as error:
        say(f"warning: cannot tell how far it is: {error}")
        return None


def _skipped_at_the_end(store: Store, name: str) -> int:
    try:
        return parse_manifest(store.get(f"{name}/manifest.json"), name).skipped_in_a_row
    except (ObjectMissing, CheckpointError):  # damage is named by the run itself, which passes over it
        return 0


def say(text: str) -> None:
    """A line for the job's own log."""
    print(f"launcher: {text}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str]) -> int:
    """What the batch script calls; returns its exit code."""
    shield_streams()
    action, folder, *rest = arguments
    job = read_job(Path(folder))
    task = job.tasks[int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))]
    place = SlurmPlace()
    if action == "begin":
        verdict = begin(job, task, place)
        say(f"{task.name}: {verdict.text}")
        failing = set(bad_nodes(read_history(task.launch), job.cluster.retry)) & set(place.nodes)
        if verdict.go and failing:
            say(f"warning: runs on {', '.join(sorted(failing))} in spite of failures there")
        return EXIT_OK if verdict.go else (verdict.code or NOTHING_TO_DO)
    verdict = end(job, task, place, int(rest[0]))
    say(f"{task.name}: {verdict.text}")
    return _again(job, task, place) if verdict.go else verdict.code


def _again(job: Job, task: Task, place: SlurmPlace) -> int:
    """Requeue this job, then keep it off the nodes that it failed on: only a job that waits can be told so."""
    bad = bad_nodes(read_history(task.launch), job.cluster.retry)
    left_out = place.leave_out(job, bad)
    if bad and not left_out:
        say(f"{', '.join(bad)} failed too often, but without it the job would not fit its partition: it is kept")
    try:
        slurm.requeue(place.job)
        if left_out:
            slurm.exclude(place.job, [*job.cluster.exclude, *left_out])
            say(f"left out from now on: {', '.join(left_out)}")
    except BackendError as error:
        say(f"error: {error}; `regen jobs resume` goes on")
        return EXIT_RESUME
    return EXIT_OK


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # to requeue a job is to end it, and this process with it
    try:
        code = main(sys.argv[1:])
    except RegenError as error:
        say(f"error: {error}")
        code = error.exit_code
    raise SystemExit(code)
