"""`regen checkpoint`: list, verify, export, import and delete checkpoints."""

from __future__ import annotations

import typer

from tools.checkpoint.maintenance import adopt, export, import_model, list_checkpoints, pin, prune, unpin, verify

app = typer.Typer(name="checkpoint", help="List, verify, export and delete checkpoints.", no_args_is_help=True)
app.command("list")(list_checkpoints)
app.command("import")(import_model)
for command in (verify, export, prune, pin, unpin, adopt):
    app.command()(command)
