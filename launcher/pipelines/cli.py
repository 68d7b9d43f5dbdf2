"""`regen submit pipeline`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.cli import Cluster, DryRun, Force, Set, Wait, app

if TYPE_CHECKING:
    from launcher.pipelines.planning import Planned


@app.command()
def pipeline(
    file: Annotated[Path, typer.Argument(help="A YAML file under configs/pipelines/.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to it, as a.b=value.", metavar="[a.b=c …]")
    ] = None,
    cluster: Cluster = "local",
    settings: Set = None,
    dry_run: DryRun = False,
    force: Force = False,
    wait: Wait = False,
) -> None:
    """Run jobs that depend on each other; what is complete is skipped, so the same command goes on where it stopped.

    On Slurm all steps are submitted at once, with dependencies; on this machine they run one after the other, and the
    command comes back when they are done.

    Example: regen submit pipeline configs/pipelines/paper.yaml --cluster slurm
    """
    from launcher.cluster import load_cluster
    from launcher.pipelines.planning import plan
    from launcher.pipelines.running import check_all, run_here, run_on_slurm
    from launcher.pipelines.schema import load_pipeline

    planned = plan(load_pipeline(file, overrides or []), cluster, settings or [])
    if dry_run:
        _show(planned)
        return
    check_all(planned, force=force, tell=_warn)
    if load_cluster(cluster, settings or []).kind == "local":
        raise typer.Exit(run_here(planned, print))
    jobs = run_on_slurm(planned, print)
    if wait:
        from launcher.waiting import wait_for

        raise typer.Exit(next((code for code in map(wait_for, jobs) if code), 0))


def _warn(text: str) -> None:
    print(text, file=sys.stderr)


def _show(planned: Sequence[Planned]) -> None:
    from rich.console import Console
    from rich.table import Table

    from launcher.showing import show

    table = Table("step", "after", "state", "nodes", "tasks", "why")
    for each in planned:
        size = f"{each.order.cluster.nodes} x {each.order.cluster.ranks_per_node}" if each.order.distributed else "1"
        table.add_row(each.name, ", ".join(each.before), each.state, size, str(len(each.order.tasks)), each.why)
    Console().print(table)
    for each in planned:
        if each.state == "run":
            print(f"\n# step {each.name}")
            show(each.order)
