"""Jobs on the suite's Slurm, and what became of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from tools.local_services.slurm import SlurmCluster

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")


def submit(cluster: SlurmCluster, folder: Path, script: str, *options: str) -> str:
    """Submit a shell script that runs in `folder` and prints into JOB.out (TASK of an array: JOB_TASK.out); its id."""
    output = "%A_%a.out" if any(each.startswith("--array") for each in options) else "%j.out"
    text = f"#!/bin/bash\n{script}\n"
    path = folder / f"job-{time.monotonic_ns()}.sh"
    path.write_text(text)
    asked = ["--parsable", f"--output={folder / output}", "--open-mode=append", *options, str(path)]
    return cluster.run("sbatch", *asked, cwd=folder)


def state(cluster: SlurmCluster, job: str) -> str:
    """What the controller says of a job, or of one task of an array: "RUNNING", "COMPLETED", …"""
    return cluster.run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T")


def said(folder: Path, job: str) -> list[str]:
    """The lines that a job of `submit` has printed by now, without Slurm's remarks among them."""
    output = folder / f"{job}.out"
    lines = output.read_text().splitlines() if output.exists() else []
    return [line for line in lines if not line.startswith(("slurmstepd", "srun: "))]


def wait_for(cluster: SlurmCluster, job: str, *states: str, timeout_s: float = 120.0) -> str:
    """Block until a job is in one of `states` (by default: has ended); fails after `timeout_s`."""
    wanted = states or ENDED
    wait_until(
        lambda: state(cluster, job) in wanted,
        lambda: f"job {job} is {state(cluster, job)}, not {wanted}; {cluster.run('scontrol', 'show', 'job', job)}",
        timeout_s,
    )
    return state(cluster, job)


def wait_until(holds: Callable[[], bool], otherwise: Callable[[], str], timeout_s: float = 120.0) -> None:
    """Block until something holds; fails with what `otherwise` tells."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, otherwise()
        time.sleep(0.1)


def accounted(cluster: SlurmCluster, job: str, *fields: str) -> list[str]:
    """Fields of a job that has ended, from sacct, which hears of it a little later."""
    command = ["--noheader", "--allocations", "--parsable2", f"--jobs={job}", f"--format=State,End,{','.join(fields)}"]

    def told() -> list[str]:
        return cluster.run("sacct", *command).splitlines()

    def ended() -> bool:
        return bool(told()) and all(line.split("|")[1] != "Unknown" for line in told())

    wait_until(ended, lambda: f"sacct says {told()} of job {job}")
    return told()[-1].split("|")[2:]


def clear_jobs(cluster: SlurmCluster) -> None:
    """Cancel every job, and wait until its nodes are free."""
    if not cluster.run("squeue", "--noheader"):
        return
    cluster.run("scancel", f"--user={cluster.design.user}")
    wait_until(lambda: not cluster.run("squeue", "--noheader"), lambda: cluster.run("squeue"))
