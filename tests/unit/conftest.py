"""Commands are built once: typer does it at every call, of all subcommands, which takes longer than most of them."""

from __future__ import annotations

from functools import cache

import typer.main
import typer.testing

typer.main.get_command = typer.testing._get_command = cache(typer.main.get_command)
