"""`regen init`: a project folder for one's own videos."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def init(
    folder: Annotated[Path, typer.Argument(help="New or empty folder.", metavar="DIR")],
    embedder: Annotated[str, typer.Option(help="Preset of configs/embedder/ to begin with.")] = "nano",
    t2v: Annotated[str, typer.Option(help="Preset of configs/t2v/ to begin with.")] = "nano",
) -> None:
    """Lay out a project folder: configs to edit, a cluster's file, and a README with the commands.

    Example: regen init my_project --embedder regen_k16
    """
    from regen_dist.config.project import lay_out

    for path in lay_out(folder, embedder, t2v):
        typer.echo(path)
    typer.echo(f"Next: cd {folder}, and read README.md")
