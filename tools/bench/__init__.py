"""`regen bench`: measurements written as JSON with hardware, versions and config hash. One file per subcommand,
imported when it is called."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

_COMMANDS = {
    "ablation": ("ablation", "Train small models with other noise paths, predictions and decoders."),
    "all": ("everything", "Run every bench of speed, into one JSON; compare it with an older one."),
    "checkpoint": ("checkpoint", "Measure how long saving blocks training, and how fast checkpoints are read."),
    "codec": ("codec", "Measure what encoding and decoding cost, beside other video codecs."),
    "compression": ("compression", "Train REGEN and the baseline at several compressions, and compare them."),
    "data": ("data", "Measure the data loader beside WebDataset and bare decoding."),
    "solvers": ("solvers", "Score generated moving shapes for each solver and number of evaluations."),
    "step": ("step", "Measure a training step: utilisation, memory, ZeRO-3 over one process."),
    "t2v": ("t2v", "Measure text-to-video training on latent caches beside encoding on the fly."),
}


class LazyGroup(TyperGroup):
    """Command group that imports a command's module only when the command is called: benches import torch."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in _COMMANDS:
            return None
        module, _ = _COMMANDS[cmd_name]
        app = typer.Typer(rich_markup_mode=None)
        app.command(cmd_name)(getattr(import_module(f"tools.bench.{module}"), module))
        return typer.main.get_command(app)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_text) for name, (_, help_text) in _COMMANDS.items()])


app = typer.Typer(cls=LazyGroup, name="bench", help="Measure, and write JSON.", no_args_is_help=True)


@app.callback()
def _bench() -> None:
    pass
