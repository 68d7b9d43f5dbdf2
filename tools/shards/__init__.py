"""`regen shards`: make, look at and check datasets of WebDataset tars with an index. One file a subcommand."""

from __future__ import annotations

import typer

from tools.shards.build import build
from tools.shards.captions import captions
from tools.shards.frames import frames
from tools.shards.index import index
from tools.shards.inspect import inspect
from tools.shards.order import order
from tools.shards.synthetic import synthetic
from tools.shards.verify import verify

app = typer.Typer(name="shards", help="Build, index, inspect and verify datasets.", no_args_is_help=True)
for command in (build, captions, frames, index, inspect, order, synthetic, verify):
    app.command()(command)
