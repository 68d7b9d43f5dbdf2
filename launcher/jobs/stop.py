"""`regen jobs stop` and `regen jobs resume`."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import chdir
from pathlib import Path

from launcher import slurm
from launcher.attempts import Attempt, End, attempts_since, now, read_history, submission_time, write_entry
from launcher.cluster import ClusterConfig, load_cluster
from launcher.job import LAUNCH, JobTask, Submission
from launcher.jobs.find import NEVER, JobState, Member, has_final_end, job_state, query_queue, shown_name
from launcher.jobs.table import duration
from launcher.retry import is_complete, newest_step
from launcher.submit import SubmissionRequest, claim_folder, submit_to_slurm, take_snapshot
from regen_dist.config import load_config
from regen_dist.config.files import load_section
from regen_dist.config.yaml_files import dump_yaml
from regen_dist.errors import BackendError, ConfigError, RegenError

_POLL_S, _ASK_EVERY_S, _MESSAGE_EVERY_S = 0.3, 3.0, 60.0
_IDS_PER_CALL = 200  # job ids per call of scancel


class StopRequest:
    """Stop request for some tasks; every poll repeats it for tasks that have not received it."""

    def __init__(self, members: Sequence[Member], *, at_once: bool) -> None:
        self._active, self._at_once = list(members), at_once
        self._signalled: set[str] = set()  # tasks that were sent a signal
        self._asked_at = float("-inf")
        here_alone = all(each.job.cluster.kind == "local" for each in members)
        self._ask_every_s = _POLL_S if here_alone else _ASK_EVERY_S
        self.states: dict[Member, JobState] = {}

    def poll(self) -> list[Member]:
        """Return the tasks that are still active, after requesting their stop (again); queries the scheduler every few
        seconds.

        Raises:
            BackendError: Slurm does not answer, or refuses.
        """
        left = [each for each in self._active if not has_final_end(each)]
        if left and time.monotonic() - self._asked_at < self._ask_every_s:
            return left
        queue = query_queue(left, must=True)
        self.states |= {each: job_state(each, queue) for each in self._active}
        self._asked_at = time.monotonic()
        self._active = [each for each in left if self.states[each].active]
        self._request(self._active)
        self._drop_pending_local()
        return self._active

    def _drop_pending_local(self) -> None:
        """Drop pending tasks of a local array whose other tasks are not stopped: such a task keeps its position and
        does not start when its turn comes."""
        for job, members in _by_job(self._active):
            if job.cluster.kind == "local" and not _covers_active_tasks(job, members):
                waiting = [each for each in members if not _attempts(each)]
                self.states |= dict.fromkeys(waiting, JobState("stopping", NEVER))
                self._active = [each for each in self._active if each not in waiting]

    def _request(self, active: Sequence[Member]) -> None:
        for member in active:  # repeated: code that was submitted earlier deletes the file as a training starts
            member.task.folder.mkdir(parents=True, exist_ok=True)
            member.task.stop_file.touch()
        for job, members in _by_job(active):
            if job.cluster.kind == "slurm":
                self._stop_in_slurm(members)
            else:
                self._stop_locally(job, members)

    def _stop_in_slurm(self, members: Sequence[Member]) -> None:
        waiting = [each for each in members if self.states[each].state in ("pending", "requeued")]
        _scancel(waiting, "--state=PENDING")  # a task that has started meanwhile reads the file STOP
        working = self._not_signalled([each for each in members if each not in waiting])
        if self._at_once:
            _scancel(working, "--signal=KILL", step=".0")  # only the ranks: the batch script records the end
            _scancel(working)
        else:
            _scancel([each for each in working if each.task.progress is None], "--signal=TERM")

    def _stop_locally(self, job: Submission, members: Sequence[Member]) -> None:
        """Signal the supervisor of all tasks if all are to end, otherwise the supervisors of the single tasks.

        Raises:
            RegenError: the job runs on another machine, and is no training that reads the file STOP.
        """
        if host := _other_host(job):
            if self._at_once or any(each.task.progress is None for each in members):
                raise RegenError(f"{job.name}: runs on {host}; give the command there")
        elif self._at_once:
            for process in _processes(job, members):
                _kill(process, signal.SIGKILL)
        elif _covers_active_tasks(job, members):
            if self._not_signalled(members):
                _kill(int(job.id() or 0), signal.SIGTERM)
        else:
            for member in self._not_signalled([each for each in members if each.task.progress is None]):
                for process in _controllers(member):
                    _kill(process, signal.SIGTERM)

    def _not_signalled(self, members: Iterable[Member]) -> list[Member]:
        """Return the tasks that have not been sent a signal yet: each is signalled once."""
        found = [each for each in members if each.queue_id not in self._signalled]
        self._signalled |= {each.queue_id for each in found}
        return found


def _attempts(member: Member) -> Sequence[Attempt]:
    """Return the attempts of this submission. Processes of earlier ones are gone: their numbers may be reused."""
    return attempts_since(read_history(member.task.launch), member.job.submitted)


def _other_host(job: Submission) -> str:
    """Return the machine on which a local job runs; "" if it is this one, or nothing has begun."""
    attempts = [each for index in range(len(job.tasks)) for each in _attempts(Member(job, index))]
    return ", ".join(sorted({node for each in attempts for node in each.start.nodes} - {socket.gethostname()}))


def _covers_active_tasks(job: Submission, members: Sequence[Member]) -> bool:
    stopped = {each.index for each in members}
    return all(has_final_end(Member(job, index)) for index in range(len(job.tasks)) if index not in stopped)


def _by_job(members: Sequence[Member]) -> list[tuple[Submission, list[Member]]]:
    found: dict[Path, list[Member]] = {}
    for member in members:
        found.setdefault(member.job.folder, []).append(member)
    return [(each[0].job, each) for each in found.values()]


def _scancel(members: Sequence[Member], *options: str, step: str = "") -> None:
    """Call scancel; if Slurm refuses, for example because the job has just ended, the next poll finds the state."""
    for first in range(0, len(members), _IDS_PER_CALL):
        try:
            slurm.run_program(
                "scancel", *options, *(f"{each.queue_id}{step}" for each in members[first : first + _IDS_PER_CALL])
            )
        except BackendError as error:
            if not step:  # the step may not have started
                print(f"note: {error}", file=sys.stderr)


def _controllers(member: Member) -> list[int]:
    """Return the Submitit process that supervises a running local task and forwards signals."""
    history = _attempts(member)
    return [int(history[-1].start.job)] if history and history[-1].end is None else []


def _processes(job: Submission, members: Sequence[Member]) -> list[int]:
    """Return the processes to kill to end local tasks immediately; their ranks end with their parent."""
    whole = _covers_active_tasks(job, members)
    tops = [int(job.id() or 0)] if whole else [process for member in members for process in _controllers(member)]
    return [process for top in tops if top for process in [top, *_descendants(top)]]


def _descendants(process: int) -> list[int]:
    """Return all descendants of a process, across its threads."""
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
    except ProcessLookupError:  # it has ended meanwhile
        return
    except PermissionError:
        raise RegenError(f"process {process} of the job belongs to another user, who has to stop it") from None


def stop(members: Sequence[Member], root: Path, *, at_once: bool, wait: bool) -> bool:
    """Stop some tasks and print how each ended; return whether all ended without failure.

    Args:
        at_once: end without saving.
        wait: wait until they have ended; otherwise request the stop once.

    Raises:
        BackendError: Slurm does not answer.
    """
    stopping = StopRequest(members, at_once=at_once)
    active = stopping.poll()
    before = {each for each in members if not stopping.states[each].active}
    if not wait:
        for member in [each for each in members if each not in before]:
            print(f"{shown_name(member.task.folder, root)}: asked to {'end' if at_once else 'save and end'}")
    elif active:
        _wait(stopping, active, root, at_once=at_once)
    for member in members:
        if member in before or wait:
            _print_end(member, stopping.states[member], root, was_over=member in before)
    return not wait or all(stopping.states[each].state in ("stopped", "stopping", "done") for each in members)


def _wait(stopping: StopRequest, active: list[Member], root: Path, *, at_once: bool) -> None:
    began = last_message = time.monotonic()
    asked = active
    while active := stopping.poll():
        if time.monotonic() - last_message > _MESSAGE_EVERY_S:
            last_message = time.monotonic()
            names = ", ".join(shown_name(each.task.folder, root) for each in active[:3])
            hint = "" if at_once else "; `regen jobs stop RUN --now` ends it without saving"
            print(
                f"waiting for {len(active)} task(s) since {duration(time.monotonic() - began)}: {names}{hint}",
                file=sys.stderr,
            )
        time.sleep(_POLL_S)
    if at_once:
        for member in asked:
            _record_end(member)


def _record_end(member: Member) -> None:
    """Record the end if no process is left to do so; otherwise the next start would count it as a failure."""
    history = _attempts(member)
    if history and history[-1].end is None:
        text = "ended by `regen jobs stop --now`"
        entry = End(why="stopped", code=128 + signal.SIGKILL, text=text, again=False, time=now())
        write_entry(member.task.launch, entry)


def _print_end(member: Member, state: JobState, root: Path, *, was_over: bool) -> None:
    name = shown_name(member.task.folder, root)
    over = "has ended before: " if was_over else ""
    text = f"{name}: {over}{state.state}{f' ({state.note})' if state.note else ''}"
    step = newest_step(member.task.progress)
    if member.task.progress is not None and step is not None:
        text += f"; saved at step {step} of {member.task.progress.steps}" if step else "; nothing is saved"
    print(text if state.state in ("done", "stopping") else f"{text}; to go on: regen jobs resume {shlex.quote(name)}")


# `regen jobs resume`: submit the newest submission again, or its incomplete tasks.


def incomplete_tasks(members: Sequence[Member], root: Path, *, force: bool = False) -> list[Member]:
    """Return the tasks that have ended without being complete.

    Args:
        force: true: if Slurm does not answer, trust the histories; tasks without a recorded end count as ended.

    Raises:
        ConfigError: there are none: they are running or complete.
        BackendError: Slurm does not answer.
    """
    queue = query_queue(members, must=not force)
    states = {each: job_state(each, queue) for each in members}
    idle = [each for each in members if not states[each].active or (force and queue.state_of(each) is None)]
    if found := [each for each in idle if not _complete(each.task)]:
        return found
    raise ConfigError(_refusal_text(states, root))


def _refusal_text(states: dict[Member, JobState], root: Path) -> str:
    active = [each for each, stand in states.items() if stand.active]
    if not active:
        names = sorted({shown_name(each.base, root) for each in states})
        return f"{', '.join(names)}: nothing is left to do, all is complete; for more steps submit it again with them"
    first = active[0]
    name, state = shown_name(first.task.folder, root), states[first].state
    more = f" (and {len(active) - 1} more)" if len(active) > 1 else ""
    return (
        f"{name}{more}: cannot be resumed while it is {state}, as job {first.queue_id}; "
        f"`regen jobs stop {shlex.quote(name)}` first"
    )


def _complete(task: JobTask) -> bool:
    step = newest_step(task.progress)
    return is_complete(read_history(task.launch), step=step, steps=task.progress.steps if task.progress else None)


def changed_cluster(job: Submission, name: str | None, overrides: Sequence[str]) -> tuple[ClusterConfig, str]:
    """Return the cluster to resume on: the previous one or the cluster `name`, with the overrides.

    Raises:
        ConfigError: an override is invalid, or the cluster does not exist.
    """
    if name is not None:
        return load_cluster(name, overrides), name
    if not overrides:
        return job.cluster, job.cluster_name
    with tempfile.TemporaryDirectory() as folder:  # overrides are applied to files
        path = Path(folder) / f"{job.cluster_name.replace('/', '_')}.yaml"
        path.write_text(dump_yaml(job.cluster.model_dump(mode="json")), encoding="utf-8")
        try:
            return load_section(ClusterConfig, path, overrides), job.cluster_name
        except ConfigError as error:
            raise ConfigError(str(error).replace(str(path), f"the cluster of {job.name}")) from None


def rebuild_request(
    members: Sequence[Member], cluster: str | None, overrides: Sequence[str]
) -> tuple[Submission, SubmissionRequest]:
    """Return the newest job that contains some of the tasks, and a request for these tasks alone.

    Raises:
        ConfigError: they are in several folders; or the cluster or the config of a run is invalid.
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
    """Submit a request for tasks of `job` from its working directory, with its code or a new snapshot.

    Raises:
        RegenError: its code is gone; or see `launcher.submit.submit`.
    """
    code = take_snapshot(request.base / LAUNCH / "code") if new_code else job.code
    if not code.is_dir():
        raise RegenError(f"{code}: the code snapshot is gone; --new-code takes one of the installed code")
    changes = {
        "cluster": request.cluster, "cluster_name": request.cluster_name, "tasks": request.tasks,
        "folder": claim_folder(request), "code": code,
        "submitted": submission_time(task.launch for task in request.tasks),
    }  # fmt: skip
    return submit_to_slurm(job.model_copy(update=changes))
