"""Queries and commands for Slurm, through its command-line programs."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from regen_dist.distributed.environment import without_ranks
from regen_dist.errors import BackendError
from regen_dist.programs import with_safe_path

_TIMEOUT_S = 60.0
_GONE = ("DOWN", "DRAIN", "FAIL", "NOT_RESPONDING", "POWERED_DOWN", "REBOOT")  # states of a node that lost its jobs
_FINISHING = ("DRAINING", "FAILING")  # it takes no new jobs, but runs those that it has
# States of jobs that have ended; jobs in any other, also one that later versions add, are in the queue or run.
ENDED = (
    "COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY",
    "LAUNCH_FAILED", "RECONFIG_FAIL", "REVOKED",
)  # fmt: skip
_UNKNOWN_JOB = "Invalid job id"
_PENDING = "Job is pending execution"
# Messages of a controller that restarts, hands over to its backup, or is busy.
_UNREACHABLE = (
    "Unable to contact slurm controller", "Socket timed out", "Zero Bytes were transmitted", "in standby mode",
    "Connection refused",
)  # fmt: skip
_PATIENCE_S, _PAUSE_S = 240.0, 5.0  # how long, and how often, a controller is asked again
# Variables by which a shell sets options of Slurm's programs, or by which an allocation describes itself. Only those
# that locate the controller are passed on: the others would change what a job requests and how answers are parsed.
_FOREIGN = ("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SINFO_", "SACCT_", "SCANCEL_", "SCONTROL_")
_KEPT = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", "SLURM_SACK_KEY", "SLURM_SACK_SOCKET")


def client_environment(inherited: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment of Slurm's programs and of jobs, without variables of another job or a rank."""
    own = {name: value for name, value in inherited.items() if name in _KEPT or not name.startswith(_FOREIGN)}
    return with_safe_path(without_ranks(own))


def ignored_variables(inherited: Mapping[str, str] = os.environ) -> list[str]:
    """Return the variables that set sbatch options in this shell and that our jobs ignore."""
    return sorted(name for name in inherited if name.startswith("SBATCH_") or name == "SLURM_CLUSTERS")


@contextmanager
def client_variables_set() -> Iterator[None]:
    """Apply `client_environment` to this process, for a library that starts Slurm's programs itself."""
    before, own = dict(os.environ), client_environment()
    try:
        os.environ.clear()
        os.environ.update(own)
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def options(script: str) -> list[str]:
    """Return a batch script's options as arguments, which take precedence over a site's sbatch defaults."""
    marked = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]
    return [option for line in marked for option in shlex.split(line)]


class SlurmUnreachable(BackendError):
    """The controller does not answer now; it may do so later."""


Answer = TypeVar("Answer")


def ask_patiently(question: Callable[[], Answer]) -> Answer:
    """Ask until the controller answers, for a few minutes: it may restart, or hand over to its backup.

    Raises:
        SlurmUnreachable: it did not answer in that time.
    """
    end = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return question()
        except SlurmUnreachable:
            if time.monotonic() >= end:
                raise
        time.sleep(_PAUSE_S)


def run_program(program: str, *arguments: str) -> str:
    """Run one of Slurm's programs without this shell's option variables; return its output.

    Raises:
        SlurmUnreachable: the controller did not answer.
        BackendError: the program is not installed, or failed (with its message).
    """
    ended = _run(program, *arguments)
    if ended.returncode:
        output = (ended.stderr.strip() or ended.stdout.strip() or "nothing").splitlines()
        raise (SlurmUnreachable if is_unreachable("\n".join(output)) else BackendError)(
            f"{program} {' '.join(arguments)}: exit code {ended.returncode}: {output[-1]}"
            "; check the job's settings, and with `sinfo` that Slurm answers"
        )
    return ended.stdout.strip()


def _run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    if shutil.which(program) is None:
        raise BackendError(f"{program} not found: run this where Slurm is installed, such as a login node")
    try:
        return subprocess.run(
            [program, *arguments], env=client_environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=_TIMEOUT_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise SlurmUnreachable(f"{program} did not answer within {_TIMEOUT_S:.0f} s; is the controller up?") from None


def is_unreachable(message: str) -> bool:
    """Return whether a program's message says that the controller does not answer."""
    return any(each in message for each in _UNREACHABLE)


def is_available() -> bool:
    """Return whether this machine can submit to Slurm."""
    return shutil.which("sbatch") is not None


def show_job(job: str) -> dict[str, str]:
    """Return the controller's fields of a job: "JobState", "PreemptTime", "EndTime", …"""
    words = run_program("scontrol", "show", "job", "--oneliner", job).split()
    return dict(word.split("=", 1) for word in reversed(words) if "=" in word)  # a comment, which is late, may hold any


def seconds_until(printed: str | None) -> float | None:
    """Return the seconds until a time that the controller printed ("2026-01-31T12:00:00"); None for "Unknown" etc."""
    try:
        return (datetime.fromisoformat(printed or "") - datetime.now()).total_seconds()
    except ValueError:
        return None


def requeue(job: str) -> None:
    """Requeue a running job; its processes are ended. A job that waits already was requeued by an earlier try."""
    try:
        run_program("scontrol", "requeue", job)
    except BackendError as error:
        if _PENDING not in str(error):
            raise


def exclude(job: str, nodes: Sequence[str]) -> None:
    """Exclude nodes from a pending job."""
    run_program("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(nodes)}")


def expand(nodelist: str) -> tuple[str, ...]:
    """Expand a node list such as "node[1-3]" to names."""
    return tuple(run_program("scontrol", "show", "hostnames", nodelist).split()) if nodelist else ()


def lost_nodes(nodes: Sequence[str]) -> tuple[str, ...]:
    """Return the nodes among `nodes` that have lost their jobs. A node that is being drained still runs its own."""
    states = _node_states(f"--nodes={','.join(nodes)}") if nodes else {}
    return tuple(node for node in nodes if _is_lost(states.get(node, "").upper()))


def _node_states(*chosen: str) -> dict[str, str]:
    lines = run_program("sinfo", "--noheader", "--Node", "--format=%N %T", *chosen).splitlines()
    return dict(line.split(maxsplit=1) for line in lines)


def _is_lost(state: str) -> bool:
    return state.endswith("*") or (state.startswith(_GONE) and not state.startswith(_FINISHING))


def unavailable_nodes(partition: str | None) -> int:
    """Count the nodes of a partition, or of all, on which no job starts now: down, drained or being drained."""
    states = _node_states(*([f"--partition={partition}"] if partition else []))
    return sum(state.endswith("*") or state.upper().startswith(_GONE) for state in states.values())


def refusal(script: str) -> str:
    """Return the message of `sbatch --test-only` against a script; "" if it would be accepted. Nodes that are down or
    drained do not count there: a job that needs them is refused, though sbatch would let it wait.

    Raises:
        SlurmUnreachable: the controller did not answer.
        BackendError: there is no sbatch.
    """
    with tempfile.TemporaryDirectory(prefix="regen-") as folder:
        path = Path(folder) / "job.sh"
        path.write_text(script, encoding="utf-8")
        ended = _run("sbatch", "--test-only", *options(script), str(path))
    if ended.returncode == 0:
        return ""
    if is_unreachable(ended.stderr):
        raise SlurmUnreachable(f"sbatch --test-only: {ended.stderr.strip()}")
    lines = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in ended.stderr.splitlines()]
    return "; ".join(line for line in lines if line and not line.startswith("Try ")) or f"code {ended.returncode}"


def queue(jobs: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Return state and reason of the jobs that the controller still knows: {"12_3": ("PENDING", "Priority")}."""
    if not jobs:
        return {}
    command = ["--noheader", "--array", "--states=all", "--format=%i|%T|%r"]
    try:
        lines = run_program("squeue", *command, f"--jobs={','.join(jobs)}").splitlines()
    except BackendError as error:
        if _UNKNOWN_JOB not in str(error):
            raise
        if len(jobs) == 1:  # ended long ago
            return {}
        return {name: printed for job in jobs for name, printed in queue([job]).items()}
    found = (line.split("|", 2) for line in lines)
    return {name: (state, reason) for name, state, reason in found}


def cancel(job: str, signal: str | None = None) -> None:
    """Cancel a job, or send its tasks a signal."""
    run_program("scancel", *([f"--signal={signal}"] if signal else []), job)
