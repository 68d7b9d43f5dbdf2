"""`python -m launcher`: start a job. `python -m launcher train CONFIG --ranks 2 [a.b=c]` does it on this machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from launcher.train import train_locally
from regen_dist.errors import RegenError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.callback()
def _launcher() -> None:
    """Start a job of this project on machines."""


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A YAML file under configs/.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to the config, as a.b=value.")] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Processes to start on this machine.")] = 1,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start from scratch where no checkpoint is whole.")] = False,
) -> None:
    """Train a config on this machine.

    Example: python -m launcher train configs/embedder/nano.yaml --ranks 2 train.steps=200
    """
    raise typer.Exit(train_locally(config, overrides or [], ranks=ranks, fresh=fresh))


def main() -> None:
    """Entry point: a RegenError becomes one message on stderr and its exit code."""
    try:
        app(prog_name="python -m launcher")
    except RegenError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
