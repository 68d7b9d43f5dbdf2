"""Submissions as their folders show them, without anything that runs."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.cluster import ClusterConfig
from launcher.job import ID_FILE, JobTask, Submission, TaskProgress, write_job
from launcher.retry import End, Start, Why, write_entry
from regen_dist.config.files import write_text_atomically
from regen_dist.observe.heartbeat import Beat, beat_path, write_beat

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
