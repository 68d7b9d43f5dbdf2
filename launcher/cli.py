"""`regen submit` (also `python -m launcher`): the command that starts jobs on a cluster or on this machine."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from regen_dist.errors import ConfigError
from regen_dist.jsontext import json_text

if TYPE_CHECKING:
    from launcher.job import Submission
    from launcher.submit import SubmissionRequest


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Start a job on a cluster, or on this machine.",
)

Cluster = Annotated[str, typer.Option(help="Name of a file in configs/cluster, or a path to one.")]
Nodes = Annotated[int | None, typer.Option(min=1, help="Number of nodes.")]
Gpus = Annotated[int | None, typer.Option(min=0, help="GPUs per node; each gets one rank.")]
Tasks = Annotated[int | None, typer.Option(min=1, help="Ranks per node, if not one per GPU.")]
Time = Annotated[int | None, typer.Option(min=1, help="Time limit in minutes.", metavar="MINUTES")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Override a key of the cluster file: partition=high.", metavar="a=b")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the batch script and the resolved job; submit nothing.")]
Force = Annotated[bool, typer.Option("--force", help="Submit despite the problems that preflight finds.")]
Wait = Annotated[bool, typer.Option("--wait", help="Wait until the job has ended and return its exit code.")]


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A YAML file under configs/.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Config overrides, as a.b=value.", metavar="[a.b=c …]")
    ] = None,
    cluster: Cluster = "local",
    nodes: Nodes = None,
    gpus_per_node: Gpus = None,
    tasks_per_node: Tasks = None,
    time: Time = None,
    settings: Set = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(help="One run per value, as one array; repeat for every combination.", metavar="a.b=c,d"),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start from step 0, as `regen train --fresh`.")] = False,
    dry_run: DryRun = False,
    force: Force = False,
    wait: Wait = False,
) -> None:
    """Train a config; the same command resumes from the newest checkpoint.

    Examples:

      regen submit train configs/embedder/regen_k32.yaml --cluster slurm --nodes 8 --gpus-per-node 8

      regen submit train configs/embedder/nano.yaml --tasks-per-node 2 --sweep optimizer.lr=1e-3,3e-3
    """
    from launcher.cluster import load_cluster
    from launcher.submit import expand_sweep, sweep_request, train_request
    from regen_dist.config import load_config

    place = load_cluster(cluster, cluster_overrides(nodes, gpus_per_node, tasks_per_node, time, settings))
    if not sweep:
        finish_submission(
            train_request(load_config(config, overrides or []), place, cluster, fresh=fresh), dry_run, force, wait
        )
        return
    if fresh:
        raise ConfigError("--fresh applies to a single run; submit the run whose checkpoints are damaged by itself")
    finish_submission(sweep_request(expand_sweep(config, overrides or [], sweep), place, cluster), dry_run, force, wait)


@app.command(context_settings={"ignore_unknown_options": True})
def run(
    name: Annotated[str, typer.Argument(help="Name of the job; its logs are in OUTPUT/NAME.")],
    command: Annotated[
        list[str], typer.Argument(help="A command of regen with its arguments.", metavar="-- COMMAND …")
    ],
    output: Annotated[Path, typer.Option(help="Parent of the job's folder.")] = Path("runs"),
    array: Annotated[
        int, typer.Option(min=1, help="Number of array tasks; {task} and {tasks} in arguments are replaced.")
    ] = 1,
    cluster: Cluster = "local",
    gpus_per_node: Gpus = None,
    time: Time = None,
    settings: Set = None,
    dry_run: DryRun = False,
    force: Force = False,
    wait: Wait = False,
) -> None:
    """Run any command of regen as a job, or as an array of tasks that share its work.

    Example: regen submit run shards --cluster slurm --gpus-per-node 0 --array 16 -- shards build s3://raw/videos
    --out s3://data/train --task {task}/{tasks}
    """
    from launcher.cluster import load_cluster
    from launcher.submit import command_request

    place = load_cluster(cluster, cluster_overrides(1, gpus_per_node, None, time, settings))
    finish_submission(command_request(name, output / name, command, place, cluster, tasks=array), dry_run, force, wait)


def cluster_overrides(
    nodes: int | None, gpus: int | None, tasks: int | None, time: int | None, settings: Sequence[str] | None
) -> list[str]:
    """Return the command-line options as overrides of the cluster file."""
    given = {"nodes": nodes, "gpus_per_node": gpus, "tasks_per_node": tasks, "time_min": time}
    return [*(settings or []), *(f"{name}={value}" for name, value in given.items() if value is not None)]


def finish_submission(request: SubmissionRequest, dry_run: bool, force: bool, wait: bool) -> None:
    """Run preflight, submit, and print how to follow the job."""
    from launcher.submit import submit

    if dry_run:
        print_submission(request)
        return
    run_preflight(request, force=force)
    job = submit(request)
    print_submitted(job)
    if wait:
        from launcher.submit import wait_for

        raise typer.Exit(wait_for(job))


# Output of `regen submit`.


def print_submission(request: SubmissionRequest) -> None:
    """Print the resolved job and its batch script; names in capitals are filled in at submission."""
    from launcher.job import LAUNCH
    from launcher.preflight import check
    from launcher.script import batch_script

    job = request.job(request.base / LAUNCH / "DATE", request.base / LAUNCH / "code" / "HASH")
    print("# the job")
    print(json_text(job.model_dump(mode="json", exclude={"submitted"}), indent=1))
    if job.cluster.kind == "slurm":
        print("# the batch script")
        print(batch_script(job), end="")
    report = check(request)
    for found in [*(f"note: {note}" for note in report.notes), *(f"problem: {each}" for each in report.problems)]:
        print(found, file=sys.stderr)


def run_preflight(request: SubmissionRequest, *, force: bool) -> None:
    """Run the preflight checks and print their notes; with `force`, print problems as warnings.

    Raises:
        PreflightError: there are problems and `force` is not set.
    """
    from launcher.preflight import check

    report = check(request)
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    if not force:
        report.raise_problems(request.name)
    for problem in report.problems:
        print(f"warning: submitted despite: {problem}", file=sys.stderr)


def print_submitted(job: Submission) -> None:
    """Print where the job was submitted and how to follow it."""
    from regen_dist.config.yaml_files import display

    where = "on this machine" if job.cluster.kind == "local" else f"to {job.cluster_name}"
    size = f"{job.cluster.nodes} node(s) x {job.cluster.ranks_per_node} rank(s)" if job.distributed else "1 process"
    array = f", {len(job.tasks)} tasks" if job.is_array else ""
    base = shlex.quote(display(job.folder.parents[1]))
    print(f"submitted {job.name} {where} as job {job.id()}: {size}{array}")
    print(f"watch it: regen jobs; regen jobs logs {base} --follow; regen jobs stop {base}")
