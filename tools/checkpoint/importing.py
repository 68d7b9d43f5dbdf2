"""`regen checkpoint import`: begin a run from an exported model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def import_model(
    export: Annotated[Path, typer.Argument(help="What `regen checkpoint export` wrote.", metavar="EXPORT")],
    config: Annotated[Path, typer.Argument(help="YAML file of the run that is to begin.", metavar="CONFIG")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to the config, as a.b=value.")] = None,
) -> None:
    """Make exported weights the checkpoint of step 0 of a new run: `regen train` with the same config then trains on
    from them, on any number of ranks and on any data.

    Example: regen checkpoint import runs/demo-model configs/demo/embedder.yaml name=tuned
    """
    from regen_dist.checkpoint.importing import import_model as job
    from regen_dist.config import T2VConfig, load_config
    from regen_dist.inference.space_files import read_space

    loaded = load_config(config, overrides or [])
    for difference in job(export, loaded):
        typer.echo(f"Note: {difference}")
    if isinstance(loaded, T2VConfig):  # so that it can generate before it has trained
        read_space(export).write(loaded.folder)
    typer.echo(f"{loaded.checkpoints}: step 0 has the weights of {export}; train on with `regen train {config} …`")
