"""`regen checkpoint list`, `pin`, `prune`, `verify`, `adopt`, `export` and `import`."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regen_dist.errors import CheckpointError, ConfigError
from regen_dist.jsontext import json_text
from regen_dist.tables import Column, Table, counted, numbers
from tools.reconstruct import Weights
from tools.shards.progress import stopping_cleanly

if TYPE_CHECKING:
    from regen_dist.checkpoint.maintenance import CheckpointEntry, CheckpointLocation, Pruned
    from regen_dist.config.run import CheckpointConfig

# Arguments and progress bar that several subcommands share.
RUN: Any = typer.Argument(
    help="Run folder, such as runs/demo/embedder; or the folder or URL (s3://…) of its checkpoints.", metavar="RUN"
)


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Yield a callback (what, done, total) that drives a live bar on stderr; the bar is removed at the end."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield show


def list_checkpoints(
    run: Annotated[str, RUN],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """List the committed checkpoints of a run, problems visible from file sizes, and uncommitted saves.

    Example: regen checkpoint list runs/demo/embedder
    """

    from rich.console import Console

    from regen_dist.checkpoint.maintenance import dangling_pointer, entries, open_checkpoints

    place = open_checkpoints(run)
    found, debris, pointer = entries(place), place.folder.debris(), dangling_pointer(place)
    if as_json:
        content = {"url": place.folder.url, "checkpoints": [each.to_json() for each in found]}
        typer.echo(json_text(content | {"debris": debris, "pointer_problem": pointer}, indent=1))
        return
    console = Console()
    if found:
        _table(place, found).show(console)
        for entry in found:
            for problem in entry.problems:
                console.print(f"step {entry.step}: {problem}", highlight=False, markup=False, soft_wrap=True)
    else:
        text = f"{place.folder.url} holds no committed checkpoint"
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    if pointer:
        console.print(f"Note: {pointer}", highlight=False, markup=False, soft_wrap=True)
    for name, size in debris.items():
        console.print(f"never committed: {name}, {size:,} bytes", highlight=False, markup=False, soft_wrap=True)
    if debris:
        console.print("The next save clears it, and so does `regen checkpoint prune`.", highlight=False)


def _table(place: CheckpointLocation, found: list[CheckpointEntry]) -> Table:
    metric = "psnr_db" if place.policy is None else place.policy.best_metric
    head = numbers("step", "samples", "saved (UTC)", "MB", "ranks", metric, fixed=True)
    rows = [[*_facts(entry, metric), "damaged" if entry.problems else "ok", ", ".join(entry.marks)] for entry in found]
    columns: list[Column | str] = [*head, Column("status", fixed=True), "marks"]
    return Table(columns, rows, title=place.folder.url, frame="light")  # fits in 80 columns


def _facts(entry: CheckpointEntry, metric: str) -> list[str]:
    manifest = entry.manifest
    if manifest is None:
        return [str(entry.step), *[""] * 5]
    value = manifest.metrics.get(metric)
    return [
        f"{entry.step}",
        f"{manifest.samples:,}",
        manifest.saved_at[:16].replace("T", " "),
        f"{manifest.size_bytes / 1e6:,.1f}",
        f"{manifest.world_size}",
        "" if value is None else f"{value:.4g}",
    ]


# `regen checkpoint pin` and `unpin`: protection from deletion.
_STEP = typer.Argument(help="Step of the checkpoint.", min=0, metavar="STEP")


def pin(run: Annotated[str, RUN], step: Annotated[int, _STEP]) -> None:
    """Protect a checkpoint from deletion, whatever the run's retention policy.

    Example: regen checkpoint pin runs/demo/embedder 500
    """
    from regen_dist.checkpoint.maintenance import open_checkpoints

    folder = open_checkpoints(run).folder
    folder.pin(step)
    typer.echo(f"step {step} in {folder.url} is pinned: it stays until it is unpinned")


def unpin(run: Annotated[str, RUN], step: Annotated[int, _STEP]) -> None:
    """Return a checkpoint to the run's retention policy.

    Example: regen checkpoint unpin runs/demo/embedder 500
    """
    from regen_dist.checkpoint.maintenance import open_checkpoints

    folder = open_checkpoints(run).folder
    if step not in folder.pins():
        typer.echo(f"step {step} in {folder.url} was not pinned")
        return
    folder.unpin(step)
    typer.echo(f"step {step} in {folder.url} is no longer pinned: the next save, or prune, may delete it")


# `regen checkpoint prune`: deletion by the retention policy.
def prune(
    run: Annotated[str, RUN],
    keep_last: Annotated[int | None, typer.Option(help="Number of newest checkpoints to keep.", min=2)] = None,
    keep_every: Annotated[
        int | None, typer.Option(help="Also keep steps that are multiples of this; 0: none.", min=0)
    ] = None,
    keep_best: Annotated[int | None, typer.Option(help="Number of best checkpoints to keep as well.", min=0)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be deleted; delete nothing.")] = False,
) -> None:
    """Delete what the run's retention policy (with these changes) does not keep, and uncommitted saves. Pinned
    checkpoints and the two newest good ones are always kept. Refused while the run trains.

    Example: regen checkpoint prune runs/demo/embedder --keep-last 2 --keep-every 1000 --dry-run
    """
    from regen_dist.checkpoint.maintenance import open_checkpoints
    from regen_dist.checkpoint.maintenance import prune as job

    place = open_checkpoints(run)
    policy = _policy(place, {"keep_last": keep_last, "keep_every": keep_every, "keep_best": keep_best})
    if place.run is None:
        typer.echo("Note: the run's folder is not known from here; see to it that the run is not training", err=True)
    _print_pruned(place, job(place, policy, dry_run=dry_run), "would be deleted" if dry_run else "deleted")


def _policy(place: CheckpointLocation, changes: dict[str, int | None]) -> CheckpointConfig:
    from regen_dist.config.run import CheckpointConfig

    given: dict[str, int | None] = {name: value for name, value in changes.items() if value is not None}
    if place.policy is None and "keep_last" not in given:
        raise ConfigError(
            f"what {place.folder.url} keeps is in its run's config, which is not here; name the run folder, or say "
            "--keep-last (and --keep-every, --keep-best)"
        )
    if given.get("keep_every") == 0:
        given["keep_every"] = None
    return (place.policy or CheckpointConfig()).model_copy(update=given)


def _print_pruned(place: CheckpointLocation, pruned: Pruned, verb: str) -> None:
    for step, size in pruned.steps.items():
        typer.echo(f"{verb}: step {step}, {size:,} bytes")
    for name, size in pruned.debris.items():
        typer.echo(f"{verb}: {name} (never committed), {size:,} bytes")
    total = sum(pruned.steps.values()) + sum(pruned.debris.values())
    typer.echo(f"{place.folder.url}: {len(pruned.steps)} checkpoints and {total:,} bytes in all {verb}")


# `regen checkpoint verify`: integrity of checkpoints.
def verify(
    run: Annotated[str, RUN],
    step: Annotated[int | None, typer.Option(help="Verify only this checkpoint.", min=0)] = None,
) -> None:
    """Read every byte of every committed checkpoint and compare checksums. Lists each damaged file; exit code 4 if
    there are any.

    Example: regen checkpoint verify runs/demo/embedder
    """
    from regen_dist.checkpoint.maintenance import check, dangling_pointer, open_checkpoints

    place = open_checkpoints(run)
    pointer = dangling_pointer(place)
    bad = [] if pointer is None or step is not None else [pointer]
    with progress_bar() as progress:
        for entry in check(place, step, lambda step, done, total: progress(f"step {step}", done, total)):
            typer.echo(_line(entry))
            bad += [f"step {entry.step}: {problem}" for problem in entry.problems]
    if bad:
        title = (
            f"{len(bad)} problem{'s' if len(bad) > 1 else ''} in {place.folder.url}; copy the files named again from "
            "where they are whole, or delete their checkpoints (a run goes on from the newest whole one by itself):"
        )
        raise CheckpointError("\n".join([title, *(f"  {each}" for each in bad)]))


def _line(entry: CheckpointEntry) -> str:
    if entry.manifest is None:
        return f"step {entry.step}: DAMAGED, its manifest cannot be read"
    size = f"{counted(len(entry.manifest.files), 'file')}, {entry.manifest.size_bytes / 1e6:,.1f} MB"
    return f"step {entry.step}: {f'DAMAGED, {len(entry.problems)} of its' if entry.problems else 'ok,'} {size}"


# `regen checkpoint adopt`: continue from checkpoints that another run folder has saved.
def adopt(
    run: Annotated[Path, typer.Argument(help="Folder of the run that is to continue, OUTPUT/NAME.", metavar="RUN")],
    checkpoints: Annotated[
        str, typer.Argument(help="Folder or URL of the checkpoints, as the refusal names it.", metavar="URL")
    ],
) -> None:
    """Assign the checkpoints at a location to this run: its folder was lost or has been replaced.

    A run resumes only from its own checkpoints; the id in RUN/run_id distinguishes them from those of another run of
    the same name.

    Example: regen checkpoint adopt runs/k32 s3://bucket/runs/k32
    """
    from regen_dist.checkpoint.maintenance import adopt_checkpoints

    newest = adopt_checkpoints(run, checkpoints)
    typer.echo(f"{run} goes on from step {newest.step} in {checkpoints}: run the same command again")


# `regen checkpoint export` and `import`: models without their runs.


class Dtype(StrEnum):
    """Dtype of stored weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"


def export(
    out: Annotated[Path, typer.Option(help="Folder for the model; empty or not existing.")],
    run: Annotated[
        Path | None,
        typer.Argument(
            help="Run folder with a checkpoint, such as runs/demo/embedder, or an exported model; without one, "
            "the packaged embedder.",
            metavar="[RUN]",
        ),
    ] = None,
    step: Annotated[int | None, typer.Option(help="Step of the checkpoint; newest good by default.", min=0)] = None,
    weights: Annotated[Weights, typer.Option(help="EMA weights, or those of the last step.")] = Weights.ema,
    statistics_clips: Annotated[
        int, typer.Option(help="Training clips on which the mean and std of the latents are measured.", min=1)
    ] = 64,
    statistics: Annotated[bool, typer.Option(help="Measure mean and std of the latents.")] = True,
    data: Annotated[
        str | None, typer.Option(help="Dataset for the statistics, if the run's own is not reachable.")
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Dtype of the stored weights; float32 by default.")] = None,
    embedder: Annotated[
        Path | None,
        typer.Option(
            help="For a text-to-video model: run or export of its embedder, to export both as a diffusers pipeline; "
            "the config's generation.embedder by default."
        ),
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="Text encoder of that pipeline, if not at the location recorded in the caches.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing exported model.")] = False,
) -> None:
    """Export a checkpoint's weights with config, model card and latent statistics to a folder, which
    `regen reconstruct --run FOLDER` and `Codec.load(FOLDER)` read without DeepSpeed; for a text-to-video run, with the
    statistics of its caches, `regen generate --run FOLDER`. The folder also has the files that diffusers opens without
    this package (docs/diffusers.md).

    Example: regen checkpoint export runs/demo/embedder --out runs/demo-model
    """
    from regen_dist.config.exported import T2VExportConfig
    from regen_dist.inference.codec import PACKAGED_EMBEDDER
    from regen_dist.inference.export import ExportOptions, export_model
    from regen_dist.inference.hub.folder import PIPELINE_FILE

    options = ExportOptions(
        step=step,
        weights=weights.value,
        dtype=None if dtype is None else dtype.value,
        statistics_clips=statistics_clips if statistics else 0,
        data=data,
        force=force,
        embedder=embedder,
        text=text,
    )
    with stopping_cleanly(continues=False), progress_bar() as progress:
        made = export_model(run or PACKAGED_EMBEDDER, out, options, progress)
    if isinstance(made, T2VExportConfig) and (data or not statistics):
        typer.echo("Note: a text-to-video model has the statistics of its caches; options about them were ignored")
    if isinstance(made, T2VExportConfig) and not (out / PIPELINE_FILE).exists():
        typer.echo("Note: the transformer alone; --embedder makes it a pipeline of diffusers (docs/diffusers.md)")
    source = f"{made.origin.run} at step {made.origin.step}" if made.origin else f"{run}, of unknown origin,"
    size = sum(path.stat().st_size for path in out.rglob("*"))
    typer.echo(
        f"{out}: the {weights.value} weights of {source} as {made.dtype}, "
        f"{size / 1e6:,.1f} MB: {', '.join(sorted(path.name for path in out.iterdir()))}"
    )


# `regen checkpoint import`: start a run from an exported model.
def import_model(
    export: Annotated[Path, typer.Argument(help="Folder written by `regen checkpoint export`.", metavar="EXPORT")],
    config: Annotated[Path, typer.Argument(help="YAML file of the new run.", metavar="CONFIG")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Config overrides, as a.b=value.")] = None,
) -> None:
    """Import exported weights as the checkpoint of step 0 of a new run: `regen train` with the same config then trains
    from them, on any number of ranks and on any data.

    Example: regen checkpoint import runs/demo-model configs/demo/embedder.yaml name=tuned
    """
    from regen_dist.checkpoint.export import import_model as job
    from regen_dist.checks.data import other_latents
    from regen_dist.config import T2VConfig, load_config
    from regen_dist.config.exported import T2VExportConfig, load_any_export_config
    from regen_dist.inference.latent_space import read_space

    loaded = load_config(config, overrides or [])
    # Read before anything is written; needed to generate before any training.
    both = isinstance(loaded, T2VConfig) and isinstance(load_any_export_config(export), T2VExportConfig)
    space = read_space(export) if both else None

    def write_space() -> None:
        if space is not None:
            space.write(loaded.folder)

    differences = job(export, loaded, write_space)
    if space is not None and isinstance(loaded, T2VConfig):
        differences += other_latents(loaded, space.facts)
    for difference in differences:
        typer.echo(f"Note: {difference}")
    again = shlex.join(["regen", "train", str(config), *(overrides or [])])
    typer.echo(f"{loaded.checkpoints}: step 0 has the weights of {export}; train on with `{again}`")
