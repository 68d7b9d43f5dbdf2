"""`regen jobs`: watch what `regen submit` has started."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launcher.cli import Gpus, Nodes, Set, Tasks, Time, Wait

_INTERRUPTED = 130  # as a shell says it of Ctrl-C

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Root = Annotated[Path, typer.Option(help="The folder of the runs.")]
RunName = Annotated[str, typer.Argument(help="A run's folder, or its name under the root.", metavar="RUN")]


@app.callback(invoke_without_command=True)
def table(
    context: typer.Context,
    root: Root = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
    watch: Annotated[
        float | None, typer.Option(min=1.0, help="Print it again every so many seconds.", metavar="SECONDS")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="A row for every task of an array.")] = False,
) -> None:
    """Show every job under the root, how it stands and how far it is; or one of the commands below.

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
    rank: Annotated[int | None, typer.Option(min=0, help="Whose; by default that of rank 0.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="How many of the newest.")] = 50,
    launcher: Annotated[
        bool, typer.Option("--launcher", help="What the batch script, srun and Submitit said instead.")
    ] = False,
) -> None:
    """Show what a rank of a job has printed; where rank 0 has not begun, what the launcher has.

    Example: regen jobs logs embedder_nano --rank 3 --follow
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
    now: Annotated[bool, typer.Option("--now", help="Without saving: it goes on from its last checkpoint.")] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Come back when it has ended.")] = True,
) -> None:
    """Save, and end for good: it is not requeued until it is resumed. What has not begun does not begin.

    Example: regen jobs stop embedder_nano
    """
    from launcher.jobs import stop as stopping
    from launcher.jobs.find import choose_job

    try:
        well = stopping.stop(choose_job(run, root), root, at_once=now, wait=wait)
    except KeyboardInterrupt:
        typer.echo(f"{run} was told to stop, and goes on stopping; see `regen jobs`", err=True)
        raise typer.Exit(_INTERRUPTED) from None
    if not well:
        raise typer.Exit(1)


@app.command()
def resume(
    run: RunName,
    root: Root = Path("runs"),
    cluster: Annotated[str | None, typer.Option(help="Another one than before.")] = None,
    nodes: Nodes = None,
    gpus_per_node: Gpus = None,
    tasks_per_node: Tasks = None,
    time: Time = None,
    settings: Set = None,
    new_code: Annotated[
        bool, typer.Option("--new-code", help="Run the code as it is now, not as it was submitted.")
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="In spite of what the checks find, or of a Slurm that does not answer."),
    ] = False,
    wait: Wait = False,
) -> None:
    """Submit a job again that has ended without being complete: the same command, config and code, from its newest
    checkpoint. Of an array, the tasks that are left.

    Example: regen jobs resume embedder_nano --nodes 2
    """
    from contextlib import chdir

    from launcher.cli import cluster_overrides, print_submitted, run_preflight
    from launcher.jobs.find import choose_job
    from launcher.jobs.stop import left_to_do, rebuild_request, resubmit
    from launcher.submit import wait_for

    overrides = cluster_overrides(nodes, gpus_per_node, tasks_per_node, time, settings)
    job, request = rebuild_request(left_to_do(choose_job(run, root), root, force=force), cluster, overrides)
    with chdir(job.workdir):
        run_preflight(request, force=force)
    submitted = resubmit(job, request, new_code=new_code)
    print_submitted(submitted)
    if wait:
        raise typer.Exit(wait_for(submitted))
