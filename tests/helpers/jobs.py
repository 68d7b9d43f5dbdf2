"""Submissions: as their folders show them, and real jobs that are held in a step and followed to their end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.attempts import Attempt, End, Start, Why, read_history, write_entry
from launcher.cluster import ClusterConfig
from launcher.job import ID_FILE, JobTask, Submission, TaskProgress, newest_job, write_job
from regen_dist.config.files import write_text_atomically
from regen_dist.observe.heartbeat import Beat, beat_path, parse_beat, read_text, write_beat
from regen_dist.observe.record import read_record
from tests.helpers.commands import regen_here

SUBMITTED = 1_000_000.0
SLURM = ClusterConfig(time_min=60, nodes=2, gpus_per_node=4)
LOCAL = ClusterConfig(kind="local")


def made_job(
    base: Path,
    tasks: Sequence[JobTask] | None = None,
    *,
    steps: int | None = 100,
    cluster: ClusterConfig = SLURM,
    job_id: str | None = "12",
    submitted: float = SUBMITTED,
    checkpoints: str | None = None,
) -> Submission:
    """A submission in `base`: of a training of `steps` steps, or of a command, or of some tasks."""
    progress = TaskProgress(checkpoints=checkpoints or str(base / "checkpoints"), steps=steps) if steps else None
    command = ("train", "--", str(base / "launch" / "config.yaml")) if steps else ("shards", "verify", "x")
    chosen = tuple(tasks or [JobTask(name=base.name, folder=base, command=command, progress=progress)])
    folder = base / "launch" / f"2026-{submitted:.0f}"
    code = base / "launch" / "code" / "0123"
    code.mkdir(parents=True, exist_ok=True)
    job = Submission(
        name=base.name, kind="train" if steps else "run", cluster=cluster, cluster_name=cluster.kind, tasks=chosen,
        distributed=bool(steps), folder=folder, workdir=base, code=code, submitted=submitted,
    )  # fmt: skip
    write_job(job)
    if job_id:
        write_text_atomically(folder / ID_FILE, f"{job_id}\n")
    return job


def array_tasks(base: Path, count: int) -> list[JobTask]:
    """Commands of an array."""
    return [
        JobTask(name=f"{base.name}[{n}]", folder=base / "tasks" / f"{n:05d}", command=("shards", "verify", str(n)))
        for n in range(count)
    ]


def started(task: JobTask, *, at: float = SUBMITTED + 10, step: int | None = 0, job: str = "12") -> None:
    """A start, in its history."""
    start = Start(job=job, restart=0, nodes=(socket.gethostname(),), step=step, time=at)
    write_entry(task.launch, start)


def ended(task: JobTask, why: Why, *, again: bool = False, at: float = SUBMITTED + 20, text: str = "") -> None:
    """The end of the newest start."""
    code = 0 if why == "done" else 75
    write_entry(task.launch, End(why=why, code=code, text=text or why, again=again, time=at))


def trained(run: Path, steps: Sequence[int], *, began: float, step_s: float = 2.0) -> None:
    """Lines of training in the record; step s is logged `step_s` times s after `began`."""
    lines = [
        {"kind": "train", "step": step, "loss": 1 / step, "clips_per_s": 8.0, "time": began + step_s * step}
        for step in steps
    ]
    recorded(run, lines)


def recorded(run: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Lines at the end of the record."""
    run.mkdir(parents=True, exist_ok=True)
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def committed(run: Path, step: int, *, at: float) -> None:
    """The pointer to the newest checkpoint."""
    pointer = run / "checkpoints" / "latest"
    pointer.parent.mkdir(parents=True, exist_ok=True)
    pointer.write_text(f"step-{step:08d}")
    os.utime(pointer, (at, at))


def beaten(run: Path, rank: int = 0, *, at: float, left: str = "", why: str = "", stood_s: float = 0.0) -> None:
    """A heartbeat."""
    beat = Beat(
        rank=rank, host="here", namespace="", pid=1, step=1, begun=1, place=0, phase="failed" if why else "data",
        left=left, why=why, stood_s=stood_s, number=1, written=at,
    )  # fmt: skip
    write_beat(run, beat)
    os.utime(beat_path(run, rank), (at, at))


# Jobs by `regen submit`, runs that are held in the middle of a step, and what became of them.


@dataclass
class Submitter:
    """Submits as a user does: by the command line, from a folder, with an environment; in this process, or in one of
    its own, of which the jobs are children that are started on this machine."""

    folder: Path
    environment: Mapping[str, str]
    own_process: bool = False

    def __call__(self, *arguments: object, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
        """`regen submit ARGUMENTS` to its end; `timeout_s` is for a process of its own."""
        environment = {**os.environ, **self.environment}
        if not self.own_process:
            return regen_here("submit", *arguments, cwd=self.folder, env=environment)
        command = [sys.executable, "-m", "tools.cli", "submit", *map(str, arguments)]
        return subprocess.run(
            command, cwd=self.folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=timeout_s, check=False,
        )  # fmt: skip

    def job(self, base: Path, *arguments: object) -> Submission:
        """Submit, and find the submission in the folder that it belongs to."""
        ended = self(*arguments)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        job = newest_job(base)
        assert job is not None
        return job


def wait_until(holds: Callable[[], object], otherwise: Callable[[], object], timeout_s: float = 120.0) -> None:
    """Block until something holds; fails with what `otherwise` tells."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, otherwise()
        time.sleep(0.05)


def attempts(folder: Path) -> list[Attempt]:
    """The starts of a task, and how each ended."""
    return read_history(folder / "launch")


def whys(folder: Path) -> list[str]:
    """Why each start of a task ended; "" for one that has not."""
    return [each.end.why if each.end else "" for each in attempts(folder)]


def wait_for_end(folder: Path, *, starts: int = 1, timeout_s: float = 180.0) -> str:
    """Block until a task has ended for good, after at least so many starts; why."""

    def ended() -> bool:
        history = attempts(folder)
        return len(history) >= starts and history[-1].end is not None and not history[-1].end.again

    wait_until(ended, lambda: told(folder), timeout_s)
    return whys(folder)[-1]


def wait_for_ends(folder: Path, count: int) -> None:
    """Block until so many starts of a task have ended."""
    wait_until(lambda: len([each for each in whys(folder) if each]) >= count, lambda: told(folder))


def told(folder: Path) -> str:
    """All that a task has said, for the message of a test that fails."""
    files = [*sorted(folder.glob("launch/starts.jsonl")), *sorted(folder.glob("launch/2*/submitit/*.err"))]
    files += sorted(folder.glob("logs/*.log"))
    return "\n".join(f"== {path}\n{path.read_text(errors='replace')[-3000:]}" for path in files)


def losses(run: Path) -> dict[int, float]:
    """The loss of every step that stands in the record."""
    return {line["step"]: line["loss"] for line in read_record(run / "metrics.jsonl", "train")}


def processes(run: Path, ranks: int, since: float) -> dict[int, int]:
    """The process of each rank that has written a heartbeat after `since`."""
    found = {}
    for rank in range(ranks):
        path = beat_path(run, rank)
        beat = parse_beat(read_text(path))
        if beat and not beat.left and path.stat().st_mtime > since:
            found[rank] = beat.pid
    return found


@contextmanager
def held(run: Path, ranks: int, step: int, *, starts: int = 1, saved: bool = False) -> Iterator[dict[int, int]]:
    """Stop the ranks of start number `starts` once the run has logged `step`, so that it gets no further meanwhile.

    Args:
        saved: wait for a committed checkpoint, too: it is written beside the steps, and may come well after its own.

    Yields:
        The process of each rank. All go on afterwards, those that still are.
    """
    wait_until(lambda: len(attempts(run)) >= starts, lambda: told(run))
    since = attempts(run)[starts - 1].start.time
    wait_until(
        lambda: (
            (run / "metrics.jsonl").exists()
            and max(losses(run), default=0) >= step
            and len(processes(run, ranks, since)) == ranks
            and (not saved or any(read_record(run / "metrics.jsonl", "checkpoint")))
        ),
        lambda: told(run),
    )
    stopped = processes(run, ranks, since)
    for process in stopped.values():
        os.kill(process, signal.SIGSTOP)
    try:
        wait_until(lambda: all(map(is_stopped, stopped.values())), lambda: told(run))
        yield stopped
    finally:
        for process in stopped.values():
            _send(process, signal.SIGCONT)


def is_stopped(process: int) -> bool:
    """Whether SIGSTOP holds a process."""
    return "State:\tT" in Path(f"/proc/{process}/status").read_text()


def _send(process: int, number: signal.Signals) -> None:
    try:
        os.kill(process, number)
    except ProcessLookupError:
        return


def has_been_told(process: int, number: signal.Signals) -> bool:
    """Whether a signal waits for a process that was stopped, or it has gone on already: Slurm wakes what it tells."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return True
    if "State:\tT" not in status:
        return True
    masks = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith(("SigPnd", "ShdPnd"))]
    return any(mask >> (number - 1) & 1 for mask in masks)
