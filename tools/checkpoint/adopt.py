"""`regen checkpoint adopt`: let a run go on from checkpoints that were saved by another run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def adopt(
    run: Annotated[Path, typer.Argument(help="Folder of the run that shall go on, OUTPUT/NAME.", metavar="RUN")],
    checkpoints: Annotated[
        str, typer.Argument(help="Folder or URL of the checkpoints, as the refusal names it.", metavar="URL")
    ],
) -> None:
    """Say that the checkpoints at a place are this run's: its folder was lost, or is another one now.

    A run goes on from its own checkpoints alone; by its id in RUN/run_id it tells them from those of another run of the
    same name.

    Example: regen checkpoint adopt runs/k32 s3://bucket/runs/k32
    """
    from regen_dist.checkpoint.tending import take_over

    newest = take_over(run, checkpoints)
    typer.echo(f"{run} goes on from step {newest.step} in {checkpoints}: run the same command again")
