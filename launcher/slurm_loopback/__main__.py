"""`python -m launcher.slurm_loopback FOLDER`: a Slurm cluster on this machine until Ctrl-C."""

from __future__ import annotations

import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from launcher.slurm_loopback.cluster import SlurmCluster, start_slurm
from launcher.slurm_loopback.daemons import SYSTEM_FOLDERS
from regen_dist.errors import BackendError, RegenError

_LOOK_S = 0.5  # how often the daemons are looked at


def run(
    folder: Annotated[Path, typer.Argument(help="A new folder for all that the cluster writes.")],
    nodes: Annotated[int, typer.Option(min=1, help="Number of nodes.")] = 2,
    cpus: Annotated[int, typer.Option(min=1, help="CPUs of each node, as declared.")] = 4,
    gpus: Annotated[int, typer.Option(min=0, help="Fake GPUs of each node.")] = 2,
    accounting: Annotated[bool, typer.Option(help="With slurmdbd and MariaDB, for sacct.")] = True,
    grace: Annotated[int, typer.Option(min=0, help="Seconds between a preempted job's signal and its end.")] = 10,
) -> None:
    """Run a Slurm cluster on loopback until Ctrl-C; FOLDER/env.sh makes a shell its client.

    Example: python -m launcher.slurm_loopback /tmp/slurm --nodes 2 --gpus 2
    """
    with start_slurm(folder, nodes=nodes, cpus=cpus, gpus=gpus, accounting=accounting, grace_s=grace) as cluster:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
        lines = environment_lines(cluster)
        (folder / "env.sh").write_text(lines)
        print(f"Slurm runs: {', '.join(cluster.nodes)}; partitions main and high. In another terminal:", flush=True)
        print(f". {shlex.quote(str(folder.resolve() / 'env.sh'))}   # it is:\n\n{lines}\nCtrl-C ends it.", flush=True)
        try:
            _watch(cluster)
        except KeyboardInterrupt:
            print("ending Slurm and its jobs", file=sys.stderr)


def environment_lines(cluster: SlurmCluster) -> str:
    """Shell lines that make a shell a client of the cluster."""
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
        app(prog_name="python -m launcher.slurm_loopback")
    except RegenError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
