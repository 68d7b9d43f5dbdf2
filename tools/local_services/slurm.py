"""A real Slurm cluster on this machine for tests, demonstrations and experiments: several nodes, all on loopback.

`start_slurm` runs it for the duration of a `with` block, `python -m tools.local_services.slurm FOLDER` until Ctrl-C.
It needs Debian's Slurm packages, but neither systemd nor root.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from regen_dist.errors import BackendError, RegenError
from tools.local_services.slurm_daemons import (
    RUN_S,
    SYSTEM_FOLDERS,
    Daemons,
    host_command,
    missing_packages,
    search_path,
    start_daemons,
    start_node,
)
from tools.local_services.slurm_files import SLURM_CONF, Design, lock_folder, short_path

# Settings of another cluster, inside whose job this process may run
_FOREIGN = ("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SINFO_", "SACCT_", "SCANCEL_", "SCONTROL_")
_LISTENING = ("srun", "salloc")  # clients to which nodes connect back


@dataclass(frozen=True)
class SlurmCluster:
    """A running cluster with partitions `main` (preempted, by requeue) and `high` (preempts)."""

    design: Design
    daemons: Daemons

    @property
    def nodes(self) -> Sequence[str]:
        """Names of the nodes. They resolve inside jobs."""
        return self.design.names

    def environment(self) -> dict[str, str]:
        """Return the variables that make any Slurm client, and Submitit, use this cluster."""
        return {
            "SLURM_CONF": str(self.design.folder / SLURM_CONF),
            "PATH": search_path(os.environ.get("PATH")),
        }

    def run(
        self,
        program: str,
        *arguments: str | Path,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
        timeout_s: float = RUN_S,
    ) -> str:
        """Run a client of this cluster and return its output.

        Args:
            program: `squeue`, `sbatch`, `scontrol`, `sacct`, ….
            arguments: passed on literally.
            cwd: working directory; with `sbatch` also that of the job.
            environment: variables in addition to those of this process. Slurm variables of this process, as inside
                another cluster's job, are not passed on.
            timeout_s: timeout in seconds.

        Raises:
            BackendError: it failed (with its output), or timed out.
        """
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
        command = [program, *map(str, arguments)]
        if program in _LISTENING and self.daemons.hosts:  # listens on the address of the host name
            command = host_command(["--hosts", str(self.daemons.hosts), "--", *command])
        try:
            ended = subprocess.run(
                command,
                cwd=cwd,
                env={**inherited, **self.environment(), **(environment or {})},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise BackendError(f"{program} did not answer within {timeout_s:.0f} s") from None
        if ended.returncode:
            said = ended.stderr.strip() or ended.stdout.strip() or "nothing"
            raise BackendError(f"{program} ended with exit code {ended.returncode} and said: {said}")
        return ended.stdout.strip()

    def end_node(self, name: str) -> None:
        """Simulate a power failure of a node: its daemon, steps and jobs are killed without notifying the
        controller."""
        self.daemons.end([name])

    def start_node(self, name: str) -> None:
        """Start a node, also again after `end_node`; it accepts jobs once it is idle."""
        start_node(self.daemons, name)


@contextmanager
def start_slurm(
    folder: Path,
    *,
    nodes: int = 2,
    cpus: int = 4,
    gpus: int = 2,
    accounting: bool = True,
    grace_s: int = 10,
) -> Iterator[SlurmCluster]:
    """Run a Slurm cluster on loopback for the duration of a `with` block; it never outlives the thread that started it.

    Jobs and steps that are still running at the end are killed. A cluster starts empty, with a random first job id; its
    logs are in `folder/log`.

    Args:
        folder: new, or used by such a cluster before. If its path is too long for sockets (or has
            characters that Slurm's files do not accept), a link in /tmp is used.
        nodes: number of nodes, named node1, node2, ….
        cpus: cores per node, as declared.
        gpus: fake GPUs per node, as GRES: CUDA_VISIBLE_DEVICES is set, but there is no device.
        accounting: true to start slurmdbd and MariaDB, for `sacct`.
        grace_s: seconds between the signal and the end of a preempted job.

    Raises:
        BackendError: packages are missing, the folder is in use or contains something else, or a daemon did not start
            (with the end of its log).
    """
    if missing := missing_packages(accounting=accounting):
        command = f"sudo apt-get install --no-install-recommends {' '.join(missing)}"
        raise BackendError(
            f"Slurm is not installed: {', '.join(missing)} missing; on Debian and Ubuntu run `{command}`"
        )
    folder = folder.resolve()
    with lock_folder(folder), short_path(folder) as short:
        design, daemons = start_daemons(
            short, nodes=nodes, cpus=cpus, gpus=gpus, accounting=accounting, grace_s=grace_s
        )
        try:
            yield SlurmCluster(design, daemons)
        finally:
            daemons.end()


# `python -m tools.local_services.slurm FOLDER`: a Slurm cluster on this machine until Ctrl-C.

_LOOK_S = 0.5  # polling interval of the daemons


def run(
    folder: Annotated[Path, typer.Argument(help="New folder for all files of the cluster.")],
    nodes: Annotated[int, typer.Option(min=1, help="Number of nodes.")] = 2,
    cpus: Annotated[int, typer.Option(min=1, help="CPUs per node, as declared.")] = 4,
    gpus: Annotated[int, typer.Option(min=0, help="Fake GPUs per node.")] = 2,
    accounting: Annotated[bool, typer.Option(help="With slurmdbd and MariaDB, for sacct.")] = True,
    grace: Annotated[int, typer.Option(min=0, help="Seconds between the signal and the end of a preempted job.")] = 10,
) -> None:
    """Run a Slurm cluster on loopback until Ctrl-C; FOLDER/env.sh makes a shell its client.

    Example: python -m tools.local_services.slurm /tmp/slurm --nodes 2 --gpus 2
    """
    with start_slurm(folder, nodes=nodes, cpus=cpus, gpus=gpus, accounting=accounting, grace_s=grace) as cluster:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # handled like Ctrl-C
        lines = environment_lines(cluster)
        (folder / "env.sh").write_text(lines)
        print(f"Slurm runs: {', '.join(cluster.nodes)}; partitions main and high. In another terminal:", flush=True)
        print(f". {shlex.quote(str(folder.resolve() / 'env.sh'))}   # it is:\n\n{lines}\nCtrl-C ends it.", flush=True)
        try:
            _watch(cluster)
        except KeyboardInterrupt:
            print("ending Slurm and its jobs", file=sys.stderr)


def environment_lines(cluster: SlurmCluster) -> str:
    """Return shell lines that make a shell a client of the cluster."""
    configuration = shlex.quote(cluster.environment()["SLURM_CONF"])
    return f'export SLURM_CONF={configuration}\nexport PATH="$PATH:{":".join(SYSTEM_FOLDERS)}"\n'


def _watch(cluster: SlurmCluster) -> None:
    while True:
        for name, process in cluster.daemons.running.items():
            if process.poll() is not None:
                raise BackendError(f"{name} ended; {cluster.daemons.tail(name)}")
        time.sleep(_LOOK_S)


def main() -> None:
    """Entry point: a RegenError becomes one message on stderr and its exit code."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(run)
    try:
        app(prog_name="python -m tools.local_services.slurm")
    except RegenError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
