"""`regen jobs stop`: save and end, or end at once."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import chdir
from pathlib import Path

from launcher import slurm
from launcher.cluster import ClusterConfig, load_cluster
from launcher.job import LAUNCH, JobTask, Submission, new_folder
from launcher.jobs.find import NEVER, JobState, Member, has_ended, job_state, query_queue, shown_name
from launcher.jobs.table import duration
from launcher.retry import End, is_complete, newest_step, now, read_history, write_entry
from launcher.submit import SubmissionRequest, submit_to_slurm, take_snapshot
from regen_dist.config import load_config
from regen_dist.config.files import load_section
from regen_dist.config.run import Section
from regen_dist.errors import BackendError, ConfigError, RegenError

_POLL_S, _ASK_EVERY_S, _SAY_EVERY_S = 0.3, 3.0, 60.0
_AT_ONCE = 200  # ids in one call of scancel


class Stopping:
    """The stopping of some tasks: every look asks again for what has not been heard."""

    def __init__(self, members: Sequence[Member], *, at_once: bool) -> None:
        self._active, self._at_once = list(members), at_once
        self._told: set[str] = set()  # those that were sent a signal
        self._asked_at = float("-inf")
        here_alone = all(each.job.cluster.kind == "local" for each in members)
        self._ask_every_s = _POLL_S if here_alone else _ASK_EVERY_S
        self.stands: dict[Member, JobState] = {}

    def look(self) -> list[Member]:
        """Which tasks go on still; they are told (again). Asks a scheduler only every few seconds.

        Raises:
            BackendError: Slurm gives no answer, or refuses.
        """
        left = [each for each in self._active if not has_ended(each)]
        if left and time.monotonic() - self._asked_at < self._ask_every_s:
            return left
        queue = query_queue(left, must=True)
        self.stands |= {each: job_state(each, queue) for each in self._active}
        self._asked_at = time.monotonic()
        self._active = [each for each in left if self.stands[each].active]
        self._tell(self._active)
        self._leave_to_their_job()
        return self._active

    def _leave_to_their_job(self) -> None:
        """A task of this machine that waits for others, which are not stopped, is not waited for: it keeps its place,
        and does not begin when its turn comes."""
        for job, members in _by_job(self._active):
            if job.cluster.kind == "local" and not _all_that_is_left(job, members):
                waiting = [each for each in members if not read_history(each.task.launch)]
                self.stands |= dict.fromkeys(waiting, JobState("stopping", NEVER))
                self._active = [each for each in self._active if each not in waiting]

    def _tell(self, active: Sequence[Member]) -> None:
        for member in active:  # also again: a rank that starts deletes the file, which was meant for an earlier start
            member.task.folder.mkdir(parents=True, exist_ok=True)
            member.task.stop_file.touch()
        for job, members in _by_job(active):
            if job.cluster.kind == "slurm":
                self._tell_slurm(members)
            else:
                self._tell_here(job, members)

    def _tell_slurm(self, members: Sequence[Member]) -> None:
        waiting = [each for each in members if self.stands[each].state in ("pending", "requeued")]
        _scancel(waiting, "--state=PENDING")  # not one that has started meanwhile: it sees the file
        working = self._new([each for each in members if each not in waiting])
        if self._at_once:
            _scancel(working, "--signal=KILL", step=".0")  # the ranks alone: the batch script notes the end
            _scancel(working)
        else:
            _scancel([each for each in working if each.task.progress is None], "--signal=TERM")

    def _tell_here(self, job: Submission, members: Sequence[Member]) -> None:
        """The process above all tasks is told where all shall end, else those above the single tasks."""
        if self._at_once:
            for process in _processes(job, members):
                _kill(process, signal.SIGKILL)
        elif _all_that_is_left(job, members):
            if self._new(members):
                _kill(int(job.id() or 0), signal.SIGTERM)
        else:
            for member in self._new([each for each in members if each.task.progress is None]):
                for process in _controllers(member):
                    _kill(process, signal.SIGTERM)

    def _new(self, members: Iterable[Member]) -> list[Member]:
        """Those that have not been sent a signal yet: it is sent once."""
        found = [each for each in members if each.queue_id not in self._told]
        self._told |= {each.queue_id for each in found}
        return found


def _all_that_is_left(job: Submission, members: Sequence[Member]) -> bool:
    stopped = {each.index for each in members}
    return all(has_ended(Member(job, index)) for index in range(len(job.tasks)) if index not in stopped)


def _by_job(members: Sequence[Member]) -> list[tuple[Submission, list[Member]]]:
    found: dict[Path, list[Member]] = {}
    for member in members:
        found.setdefault(member.job.folder, []).append(member)
    return [(each[0].job, each) for each in found.values()]


def _scancel(members: Sequence[Member], *options: str, step: str = "") -> None:
    """Tell Slurm; where it refuses, as for a job that has ended meanwhile, the next look tells what is."""
    for first in range(0, len(members), _AT_ONCE):
        try:
            slurm.run_program(
                "scancel", *options, *(f"{each.queue_id}{step}" for each in members[first : first + _AT_ONCE])
            )
        except BackendError as error:
            if not step:  # which may not have begun
                print(f"note: {error}", file=sys.stderr)


def _controllers(member: Member) -> list[int]:
    """The process of Submitit above a running task of this machine, which hands signals on."""
    history = read_history(member.task.launch)
    return [int(history[-1].start.job)] if history and history[-1].end is None else []


def _processes(job: Submission, members: Sequence[Member]) -> list[int]:
    """What to kill so that some tasks of this machine end at once; their ranks end with the process above them."""
    whole = _all_that_is_left(job, members)
    tops = [int(job.id() or 0)] if whole else [process for member in members for process in _controllers(member)]
    return [process for top in tops if top for process in [top, *_descendants(top)]]


def _descendants(process: int) -> list[int]:
    """All that a process has started, by whichever of its threads, and what these have."""
    children: list[int] = []
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            children += map(int, path.read_text().split())
        except OSError:  # it has ended
            continue
    return [each for child in children for each in [child, *_descendants(child)]]


def _kill(process: int, number: signal.Signals) -> None:
    try:
        os.kill(process, number)
    except ProcessLookupError:  # it has ended by itself
        return
    except PermissionError:
        raise RegenError(f"process {process} of the job belongs to somebody else, who alone can stop it") from None


def stop(members: Sequence[Member], root: Path, *, at_once: bool, wait: bool) -> bool:
    """Stop some tasks, and tell how each ended; whether all ended well.

    Args:
        at_once: without saving.
        wait: until they have ended; else they are told once.

    Raises:
        BackendError: Slurm gives no answer.
    """
    stopping = Stopping(members, at_once=at_once)
    active = stopping.look()
    before = {each for each in members if not stopping.stands[each].active}
    if not wait:
        for member in [each for each in members if each not in before]:
            print(f"{shown_name(member.task.folder, root)}: was told to {'end' if at_once else 'save and end'}")
    elif active:
        _wait(stopping, active, root, at_once=at_once)
    for member in members:
        if member in before or wait:
            _say(member, stopping.stands[member], root, was_over=member in before)
    return not wait or all(stopping.stands[each].state in ("stopped", "stopping", "done") for each in members)


def _wait(stopping: Stopping, active: list[Member], root: Path, *, at_once: bool) -> None:
    began = said = time.monotonic()
    told = active
    while active := stopping.look():
        if time.monotonic() - said > _SAY_EVERY_S:
            said = time.monotonic()
            names = ", ".join(shown_name(each.task.folder, root) for each in active[:3])
            hint = "" if at_once else "; `regen jobs stop RUN --now` ends it without saving"
            print(f"waiting for {len(active)} task(s) since {duration(said - began)}: {names}{hint}", file=sys.stderr)
        time.sleep(_POLL_S)
    if at_once:
        for member in told:
            _note_end(member)


def _note_end(member: Member) -> None:
    """Where nobody was left to note it: else the next start would take it for a failure."""
    history = read_history(member.task.launch)
    if history and history[-1].end is None:
        text = "ended by `regen jobs stop --now`"
        entry = End(why="stopped", code=128 + signal.SIGKILL, text=text, again=False, time=now())
        write_entry(member.task.launch, entry)


def _say(member: Member, stands: JobState, root: Path, *, was_over: bool) -> None:
    name = shown_name(member.task.folder, root)
    over = "has ended before: " if was_over else ""
    text = f"{name}: {over}{stands.state}{f' ({stands.note})' if stands.note else ''}"
    step = newest_step(member.task.progress)
    if member.task.progress is not None and step is not None:
        text += f"; saved at step {step} of {member.task.progress.steps}"
    print(text if stands.state in ("done", "stopping") else f"{text}; to go on: regen jobs resume {shlex.quote(name)}")


# `regen jobs resume`: the newest submission again, or what is left of it.


def left_to_do(members: Sequence[Member], root: Path, *, force: bool = False) -> list[Member]:
    """The tasks that have ended without being complete.

    Args:
        force: where Slurm does not answer, believe the histories; and take what has never said its last word for ended.

    Raises:
        ConfigError: there are none: they run, or are complete.
        BackendError: Slurm does not answer.
    """
    queue = query_queue(members, must=not force)
    stands = {each: job_state(each, queue) for each in members}
    idle = [each for each in members if not stands[each].active or (force and queue.told(each) is None)]
    if found := [each for each in idle if not _complete(each.task)]:
        return found
    raise ConfigError(_refusal(stands, root))


def _refusal(stands: dict[Member, JobState], root: Path) -> str:
    active = [each for each, stand in stands.items() if stand.active]
    if not active:
        names = sorted({shown_name(each.base, root) for each in stands})
        return f"{', '.join(names)}: nothing is left to do, all is complete; for more steps submit it again with them"
    first = active[0]
    name, state = shown_name(first.task.folder, root), stands[first].state
    more = f" (and {len(active) - 1} more)" if len(active) > 1 else ""
    return (
        f"{name}{more}: cannot be resumed while it is {state}, as job {first.queue_id}; "
        f"`regen jobs stop {shlex.quote(name)}` first"
    )


def _complete(task: JobTask) -> bool:
    step = newest_step(task.progress)
    return is_complete(read_history(task.launch), step=step, steps=task.progress.steps if task.progress else None)


def changed_cluster(job: Submission, name: str | None, overrides: Sequence[str]) -> tuple[ClusterConfig, str]:
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


def rebuild_request(
    members: Sequence[Member], cluster: str | None, overrides: Sequence[str]
) -> tuple[Submission, SubmissionRequest]:
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
    return job, SubmissionRequest(job.name, job.kind, members[0].base, tasks, place, name, configs)


def resubmit(job: Submission, request: SubmissionRequest, *, new_code: bool = False) -> Submission:
    """Submit an order of tasks of `job`: from the folder it was submitted from, with its code or a new copy.

    Raises:
        RegenError: its code is gone, or as of `launcher.submit.submit`.
    """
    code = take_snapshot(request.base / LAUNCH / "code") if new_code else job.code
    if not code.is_dir():
        raise RegenError(f"{code}: the copy of the code is gone; --new-code takes one of the code that is installed")
    changes = {
        "cluster": request.cluster, "cluster_name": request.cluster_name, "tasks": request.tasks,
        "folder": new_folder(request.base), "code": code, "submitted": time.time(),
    }  # fmt: skip
    return submit_to_slurm(job.model_copy(update=changes))
