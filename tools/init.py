"""`regen init`: project folder for the user's own videos."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def init(
    folder: Annotated[Path, typer.Argument(help="New or empty folder.", metavar="DIR")],
    embedder: Annotated[str, typer.Option(help="Preset of configs/embedder/ to start from.")] = "nano",
    t2v: Annotated[str, typer.Option(help="Preset of configs/t2v/ to start from.")] = "nano",
) -> None:
    """Create a project folder: configs to edit, a cluster file, and a README with the commands.

    Example: regen init my_project --embedder regen_k16
    """
    from regen_dist.config.project import lay_out

    for path in lay_out(folder, embedder, t2v):
        typer.echo(path)
    typer.echo(f"Next: cd {folder}, and read README.md")
