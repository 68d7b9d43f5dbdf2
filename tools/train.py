"""`regen train`: start or resume a run, as one rank or as several on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def train(
    config: Annotated[Path, typer.Argument(help="YAML file under configs/.", metavar="CONFIG")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Config overrides, as a.b=value.", metavar="[a.b=c …]")
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Processes on this machine; 1 by default, unless a launcher starts ranks.")
    ] = None,
    fresh: Annotated[
        bool,
        typer.Option("--fresh", help="Start from step 0 if there are checkpoints and all of them are damaged."),
    ] = False,
) -> None:
    """Train an embedder or a text-to-video model. The same command resumes from the newest checkpoint.

    Exit code 0 when done, 75 when stopped early (a signal, a file STOP in the run folder, or train.time_limit_s) with
    everything saved.

    Example: regen train configs/embedder/nano.yaml --ranks 2 train.steps=200
    """
    from regen_dist.distributed.environment import starts_ranks
    from regen_dist.observe.terminal import shield_streams

    shield_streams()
    if starts_ranks(os.environ, asked=ranks is not None):
        from launcher.supervise import train_locally

        raise typer.Exit(train_locally(config, overrides or [], ranks=ranks or 1, fresh=fresh))
    from regen_dist.config import load_config
    from regen_dist.training.stopping import SignalInbox

    earlier = SignalInbox().listen()
    loaded = load_config(config, overrides or [])  # before torch is imported: config errors are reported quickly
    from regen_dist.distributed.rendezvous import ending_at_once
    from regen_dist.training.run import train as train_rank

    with ending_at_once():
        code = train_rank(loaded, fresh=fresh, earlier=earlier)
    earlier.close()
    raise typer.Exit(code)
