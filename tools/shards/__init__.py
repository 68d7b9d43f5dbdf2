"""`regen shards`: build, inspect and verify datasets of WebDataset tars with an index. One file per subcommand."""

from __future__ import annotations

import typer

from tools.shards.build import build, index, synthetic
from tools.shards.inspect import captions, inspect, order, verify
from tools.shards.progress import frames

app = typer.Typer(name="shards", help="Build, index, inspect and verify datasets.", no_args_is_help=True)
for command in (build, captions, frames, index, inspect, order, synthetic, verify):
    app.command()(command)
