"""What the launcher asks of Slurm's own programs, and what they answer."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime

from regen_dist.distributed.environment import without_ranks
from regen_dist.errors import BackendError
from regen_dist.programs import with_safe_path

_TIMEOUT_S = 60.0
_GONE = ("DOWN", "DRAIN", "FAIL", "NOT_RESPONDING", "POWERED_DOWN", "REBOOT")  # of a node that has lost its jobs
_UNKNOWN_JOB = "Invalid job id"
# A shell's wishes for Slurm's programs, and what an allocation tells those inside it. Of these only the way to the
# controller is passed on: the rest would change what a job asks for, and what is read from their answers.
_FOREIGN = ("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SINFO_", "SACCT_", "SCANCEL_", "SCONTROL_")
_KEPT = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", "SLURM_SACK_KEY", "SLURM_SACK_SOCKET")


def client_environment(inherited: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What Slurm's programs inherit, and with sbatch the job: nothing of another job, and no rank."""
    own = {name: value for name, value in inherited.items() if name in _KEPT or not name.startswith(_FOREIGN)}
    return with_safe_path(without_ranks(own))


def overruled(inherited: Mapping[str, str] = os.environ) -> list[str]:
    """Variables by which a shell gives sbatch options, which a job of ours does not take over."""
    return sorted(name for name in inherited if name.startswith("SBATCH_") or name == "SLURM_CLUSTERS")


@contextmanager
def as_client() -> Iterator[None]:
    """This process's own environment as `client_environment`, for a library that starts Slurm's programs itself."""
    before, own = dict(os.environ), client_environment()
    try:
        os.environ.clear()
        os.environ.update(own)
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def options(script: str) -> list[str]:
    """The options that a batch script asks for, as arguments: these also win over what a site sets for sbatch."""
    marked = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]
    return [option for line in marked for option in shlex.split(line)]


def ask(program: str, *arguments: str) -> str:
    """Run one of Slurm's programs, without the wishes of this shell for it; returns what it printed.

    Raises:
        BackendError: it is not here, refused (with its words), or did not answer within a minute.
    """
    if shutil.which(program) is None:
        raise BackendError(f"{program} is not found: run this where Slurm's programs are, as on a login node")
    try:
        ended = subprocess.run(
            [program, *arguments], env=client_environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=_TIMEOUT_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise BackendError(f"{program} gave no answer within {_TIMEOUT_S:.0f} s; is the controller up?") from None
    if ended.returncode:
        said = (ended.stderr.strip() or ended.stdout.strip() or "nothing").splitlines()
        raise BackendError(f"{program} {' '.join(arguments)}: exit code {ended.returncode}: {said[-1]}")
    return ended.stdout.strip()


def is_here() -> bool:
    """Whether this machine can submit."""
    return shutil.which("sbatch") is not None


def show_job(job: str) -> dict[str, str]:
    """What the controller says of a job: "JobState", "PreemptTime", "EndTime", …"""
    words = ask("scontrol", "show", "job", "--oneliner", job).split()
    return dict(word.split("=", 1) for word in words if "=" in word)


def seconds_until(told: str | None) -> float | None:
    """How far away a time is that the controller tells ("2026-01-31T12:00:00"); None for "Unknown" and the like."""
    try:
        return (datetime.fromisoformat(told or "") - datetime.now()).total_seconds()
    except ValueError:
        return None


def requeue(job: str) -> None:
    """Put a running job back into the queue; its processes are ended."""
    ask("scontrol", "requeue", job)


def exclude(job: str, nodes: Sequence[str]) -> None:
    """Keep a job that waits in the queue off some nodes."""
    ask("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(nodes)}")


def expand(nodelist: str) -> tuple[str, ...]:
    """ "node[1-3]" as its names."""
    return tuple(ask("scontrol", "show", "hostnames", nodelist).split()) if nodelist else ()


def lost_nodes(nodes: Sequence[str]) -> tuple[str, ...]:
    """Those of some nodes that are down or on their way to it."""
    if not nodes:
        return ()
    lines = ask("sinfo", "--noheader", "--Node", f"--nodes={','.join(nodes)}", "--format=%N %T").splitlines()
    states = dict(line.split(maxsplit=1) for line in lines)
    return tuple(
        node for node in nodes if states.get(node, "").endswith("*") or states.get(node, "").upper().startswith(_GONE)
    )


def partition_nodes(partition: str | None) -> tuple[str, ...]:
    """Names of all nodes of a partition, or of the default one."""
    chosen = [f"--partition={partition}"] if partition else []
    lines = ask("sinfo", "--noheader", "--Node", "--format=%N %P", *chosen).splitlines()
    named = [line.split() for line in lines]
    return tuple(sorted({name for name, where in named if partition or where.endswith("*")}))


def queue(jobs: Sequence[str]) -> dict[str, tuple[str, str]]:
    """State and reason of those of some jobs that the controller still knows: {"12_3": ("PENDING", "Priority")}."""
    if not jobs:
        return {}
    command = ["--noheader", "--array", "--states=all", "--format=%i|%T|%r"]
    try:
        lines = ask("squeue", *command, f"--jobs={','.join(jobs)}").splitlines()
    except BackendError as error:
        if _UNKNOWN_JOB not in str(error):
            raise
        if len(jobs) == 1:  # ended long ago
            return {}
        return {name: told for job in jobs for name, told in queue([job]).items()}
    found = (line.split("|", 2) for line in lines)
    return {name: (state, reason) for name, state, reason in found}


def cancel(job: str, signal: str | None = None) -> None:
    """Cancel a job, or send its tasks a signal."""
    ask("scancel", *([f"--signal={signal}"] if signal else []), job)
