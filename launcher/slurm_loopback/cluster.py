"""A Slurm cluster for the length of a `with` block."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from launcher.slurm_loopback.configuration import Design
from launcher.slurm_loopback.daemons import Daemons, host_command, missing_packages, search_path
from launcher.slurm_loopback.folder import SLURM_CONF, held, short_path
from launcher.slurm_loopback.startup import start, start_node
from regen_dist.errors import BackendError

RUN_S = 60.0
# Settings of another cluster, whose job this process may be
_FOREIGN = ("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SINFO_", "SACCT_", "SCANCEL_", "SCONTROL_")
_LISTENING = ("srun", "salloc")  # clients that nodes call back


@dataclass(frozen=True)
class SlurmCluster:
    """A running cluster: partitions `main` (preempted, by requeue) and `high` (preempts)."""

    design: Design
    daemons: Daemons

    @property
    def nodes(self) -> Sequence[str]:
        """Names of the nodes. They resolve inside jobs."""
        return self.design.names

    def environment(self) -> dict[str, str]:
        """The variables that make any Slurm client, and Submitit, talk to this cluster."""
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
        """Run a client of this cluster and return what it printed.

        Args:
            program: `squeue`, `sbatch`, `scontrol`, `sacct`, ….
            arguments: passed on literally.
            cwd: where it runs, and with `sbatch` the job too.
            environment: variables beside those of this process. Slurm's own of this process, as inside another
                cluster's job, are not passed on.
            timeout_s: how long it may take.

        Raises:
            BackendError: it failed (with what it said), or took longer.
        """
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
        command = [program, *map(str, arguments)]
        if program in _LISTENING and self.daemons.hosts:  # on the address of the host name
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
            raise BackendError(f"{program} gave no answer within {timeout_s:.0f} s") from None
        if ended.returncode:
            said = ended.stderr.strip() or ended.stdout.strip() or "nothing"
            raise BackendError(f"{program} ended with exit code {ended.returncode} and said: {said}")
        return ended.stdout.strip()

    def end_node(self, name: str) -> None:
        """Cut a node's power: its daemon, steps and jobs are killed, and nobody tells the controller."""
        self.daemons.end([name])

    def start_node(self, name: str) -> None:
        """Start a node, again after `end_node`; it takes jobs once it is idle."""
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
    """Run a Slurm cluster on loopback for the length of a `with` block; it never outlives the thread that started it.

    Jobs and steps that still run at the end are killed. A cluster starts empty, its first job id is drawn, and its logs
    are in `folder/log`.

    Args:
        folder: a new one, or one that such a cluster ran in. It holds everything; where its path is too long for
            sockets (or has characters that Slurm's files do not take) a link in /tmp stands for it meanwhile.
        nodes: how many, named node1, node2, ….
        cpus: of each node, as declared.
        gpus: fake ones of each node, as GRES: CUDA_VISIBLE_DEVICES is set, and there is nothing behind it.
        accounting: with slurmdbd and MariaDB, for `sacct`.
        grace_s: between the signal that a preempted job gets and its end.

    Raises:
        BackendError: packages are missing, the folder is another's or in use, or a daemon did not come up (with the end
            of its log).
    """
    if missing := missing_packages(accounting=accounting):
        command = f"sudo apt-get install --no-install-recommends {' '.join(missing)}"
        raise BackendError(
            f"Slurm is not installed: {', '.join(missing)} missing; on Debian and Ubuntu run `{command}`"
        )
    folder = folder.resolve()
    with held(folder), short_path(folder) as short:
        design, daemons = start(short, nodes=nodes, cpus=cpus, gpus=gpus, accounting=accounting, grace_s=grace_s)
        try:
            yield SlurmCluster(design, daemons)
        finally:
            daemons.end()
