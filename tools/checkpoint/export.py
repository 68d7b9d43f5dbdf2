"""`regen checkpoint export` and `import`: models without their runs."""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tools.checkpoint.maintenance import progress_bar
from tools.reconstruct import Weights
from tools.shards.progress import stopping_cleanly


class Dtype(StrEnum):
    """Dtype of stored weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"


def export(
    out: Annotated[Path, typer.Option(help="Folder for the model; empty or not existing.")],
    run: Annotated[
        Path | None,
        typer.Argument(
            help="Run folder with a checkpoint, such as runs/demo, or an exported model; without one, "
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

    Example: regen checkpoint export runs/demo --out runs/demo-model
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
    with stopping_cleanly(), progress_bar() as progress:
        made = export_model(run or PACKAGED_EMBEDDER, out, options, progress)
    assert made.origin is not None, "it comes from a checkpoint"
    if isinstance(made, T2VExportConfig) and (data or not statistics):
        typer.echo("Note: a text-to-video model has the statistics of its caches; options about them were ignored")
    if isinstance(made, T2VExportConfig) and not (out / PIPELINE_FILE).exists():
        typer.echo("Note: the transformer alone; --embedder makes it a pipeline of diffusers (docs/diffusers.md)")
    size = sum(path.stat().st_size for path in out.rglob("*"))
    typer.echo(
        f"{out}: the {weights.value} weights of {made.origin.run} at step {made.origin.step} as {made.dtype}, "
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
    from regen_dist.config import T2VConfig, load_config
    from regen_dist.inference.latent_space import read_space

    loaded = load_config(config, overrides or [])
    for difference in job(export, loaded):
        typer.echo(f"Note: {difference}")
    if isinstance(loaded, T2VConfig):  # needed to generate before any training
        read_space(export).write(loaded.folder)
    again = f"regen train {shlex.quote(str(config))} …"
    typer.echo(f"{loaded.checkpoints}: step 0 has the weights of {export}; train on with `{again}`")
