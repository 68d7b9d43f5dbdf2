"""`regen submit pipeline`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.cli import Cluster, DryRun, Force, Set, Wait, app

if TYPE_CHECKING:
    from launcher.pipelines.planning import PlannedStep


@app.command()
def pipeline(
    file: Annotated[Path, typer.Argument(help="A YAML file under configs/pipelines/.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Pipeline overrides, as a.b=value.", metavar="[a.b=c …]")
    ] = None,
    cluster: Cluster = "local",
    settings: Set = None,
    dry_run: DryRun = False,
    force: Force = False,
    wait: Wait = False,
) -> None:
    """Run dependent jobs; complete steps are skipped, so the same command continues an interrupted pipeline.

    On Slurm all steps are submitted at once, with dependencies; on this machine they run one after the other, and the
    command returns when they are done.

    Example: regen submit pipeline configs/pipelines/paper.yaml --cluster slurm
    """
    from launcher.cluster import load_cluster
    from launcher.pipelines.planning import plan
    from launcher.pipelines.run import check_all, pipeline_lock, run_locally, run_on_slurm, wait_for_jobs
    from launcher.pipelines.schema import load_pipeline

    found = load_pipeline(file, overrides or [])
    if dry_run:
        _show(plan(found, cluster, settings or []))
        return
    with pipeline_lock(found.folder):
        planned = plan(found, cluster, settings or [])
        if all(each.state == "complete" for each in planned):
            _print_line(
                "\n".join([*(f"{each.name}: skipped, {each.why}" for each in planned), "nothing is left to do"])
            )
            return
        check_all(planned, force=force, emit=_warn)
        if load_cluster(cluster, settings or []).kind == "local":
            raise typer.Exit(run_locally(planned, _print_line))
        jobs = run_on_slurm(planned, _print_line)
    if wait:
        raise typer.Exit(wait_for_jobs(jobs, _print_line))


def _print_line(text: str) -> None:
    print(text, flush=True)  # readers of a pipe need each line while the steps run


def _warn(text: str) -> None:
    print(text, file=sys.stderr)


def _show(planned: Sequence[PlannedStep]) -> None:
    from launcher.pipelines.run import problems, scripts, table

    for line in (*table(planned), *scripts(planned)):
        print(line)
    for problem in problems(planned, _warn):
        _warn(f"problem: {problem}")
