"""`regen jobs`: follow and control the jobs that `regen submit` has started."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launcher.cli import Gpus, Nodes, Set, Tasks, Time, Wait

_INTERRUPTED = 130  # a shell's exit code for Ctrl-C

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Root = Annotated[Path, typer.Option(help="Folder of the runs.")]
RunName = Annotated[str, typer.Argument(help="A run's folder, or its name under the root.", metavar="RUN")]


@app.callback(invoke_without_command=True)
def table(
    context: typer.Context,
    root: Root = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
    watch: Annotated[float | None, typer.Option(min=1.0, help="Refresh every SECONDS.", metavar="SECONDS")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Show one row per task of an array.")] = False,
) -> None:
    """Show state and progress of every job under the root, or run one of the commands below.

    Example: regen jobs --watch 10
    """
    if context.invoked_subcommand is not None:
        return
    from launcher.jobs.table import show

    try:
        show(root, as_json=as_json, fold=not everything, every_s=watch)
    except KeyboardInterrupt:
        raise typer.Exit(_INTERRUPTED) from None


@app.command()
def logs(
    run: RunName,
    root: Root = Path("runs"),
    rank: Annotated[int | None, typer.Option(min=0, help="Rank whose log is shown; 0 by default.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Follow until the job has ended.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="Number of lines, counted from the end.")] = 50,
    launcher: Annotated[
        bool, typer.Option("--launcher", help="Show the output of the batch script, srun and Submitit instead.")
    ] = False,
) -> None:
    """Show the log of a rank; if rank 0 has not begun, the log of the launcher.

    Example: regen jobs logs nano --rank 3 --follow
    """
    from launcher.jobs import logs as following
    from launcher.jobs.find import choose_job
    from launcher.jobs.logs import choose_logs, show

    member = choose_logs(choose_job(run, root), root)
    if not follow:
        show(member, rank, launcher=launcher, lines=lines)
        return
    try:
        stands = following.follow(member, rank, launcher=launcher, lines=lines)
    except KeyboardInterrupt:
        raise typer.Exit(_INTERRUPTED) from None
    typer.echo(f"{run}: {stands.state}{f' ({stands.note})' if stands.note else ''}", err=True)


@app.command()
def stop(
    run: RunName,
    root: Root = Path("runs"),
    now: Annotated[bool, typer.Option("--now", help="End without saving; resume from its last checkpoint.")] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it has ended.")] = True,
) -> None:
    """Save and end a job; it is not requeued until it is resumed. Pending tasks do not start.

    Example: regen jobs stop nano
    """
    from launcher.jobs import stop as stopping
    from launcher.jobs.find import choose_job

    try:
        well = stopping.stop(choose_job(run, root), root, at_once=now, wait=wait)
    except KeyboardInterrupt:
        typer.echo(f"{run} was asked to stop and is still stopping; see `regen jobs`", err=True)
        raise typer.Exit(_INTERRUPTED) from None
    if not well:
        raise typer.Exit(1)


@app.command()
def resume(
    run: RunName,
    root: Root = Path("runs"),
    cluster: Annotated[str | None, typer.Option(help="Cluster to run on; as before by default.")] = None,
    nodes: Nodes = None,
    gpus_per_node: Gpus = None,
    tasks_per_node: Tasks = None,
    time: Time = None,
    settings: Set = None,
    new_code: Annotated[
        bool, typer.Option("--new-code", help="Run the current code instead of the code that was submitted.")
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Submit despite preflight problems, or if Slurm does not answer."),
    ] = False,
    wait: Wait = False,
) -> None:
    """Submit an incomplete job again: same command, config and code, from its newest checkpoint. For an array, only the
    incomplete tasks are submitted.

    Example: regen jobs resume nano --nodes 2
    """
    from contextlib import chdir

    from launcher.cli import cluster_overrides, print_submitted, run_preflight
    from launcher.jobs.find import choose_job
    from launcher.jobs.stop import incomplete_tasks, rebuild_request, resubmit
    from launcher.submit import wait_for

    overrides = cluster_overrides(nodes, gpus_per_node, tasks_per_node, time, settings)
    job, request = rebuild_request(incomplete_tasks(choose_job(run, root), root, force=force), cluster, overrides)
    with chdir(job.workdir):
        run_preflight(request, force=force)
    submitted = resubmit(job, request, new_code=new_code)
    print_submitted(submitted)
    if wait:
        raise typer.Exit(wait_for(submitted))
