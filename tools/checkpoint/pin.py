"""`regen checkpoint pin` and `unpin`: keep a checkpoint for good."""

from __future__ import annotations

from typing import Annotated

import typer

from tools.checkpoint.place import RUN

_STEP = typer.Argument(help="Step of the checkpoint.", min=0, metavar="STEP")


def pin(run: Annotated[str, RUN], step: Annotated[int, _STEP]) -> None:
    """Never delete a checkpoint, whatever the run's policy says.

    Example: regen checkpoint pin runs/demo 400
    """
    from regen_dist.checkpoint.tending import open_place

    folder = open_place(run).folder
    folder.pin(step)
    typer.echo(f"step {step} in {folder.url} is pinned: it stays until it is unpinned")


def unpin(run: Annotated[str, RUN], step: Annotated[int, _STEP]) -> None:
    """Let the run's policy decide again whether a checkpoint stays.

    Example: regen checkpoint unpin runs/demo 400
    """
    from regen_dist.checkpoint.tending import open_place

    folder = open_place(run).folder
    if step not in folder.pins():
        typer.echo(f"step {step} in {folder.url} was not pinned")
        return
    folder.unpin(step)
    typer.echo(f"step {step} in {folder.url} is no longer pinned: the next save, or prune, may delete it")
