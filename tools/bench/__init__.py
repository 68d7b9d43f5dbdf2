"""`regen bench`: measurements that write JSON, with the hardware, the versions and the config's hash beside the
figures. One file a subcommand."""

from __future__ import annotations

import typer

from tools.bench.ablation import ablation
from tools.bench.checkpoint import checkpoint
from tools.bench.codec import codec
from tools.bench.compression import compression
from tools.bench.data import data
from tools.bench.everything import everything
from tools.bench.step import step
from tools.bench.t2v import t2v

app = typer.Typer(name="bench", help="Measure, and write JSON.", no_args_is_help=True)
for command in (ablation, checkpoint, codec, compression, data, step, t2v):
    app.command()(command)
app.command("all")(everything)
