"""`regen`: the console command with all subcommands. Imports nothing heavy, so that `--help` is fast."""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from regen_dist import __version__
from regen_dist.errors import ConfigError, errors_in_one_line
from regen_dist.observe.terminal import shield_stderr
from regen_dist.programs import flushing_stdout, print_any_text, start_safely

app = typer.Typer(
    name="regen",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_COMMANDS = {
    "demo": ("demo", "demo"),
    "miniature": ("miniature", "miniature"),
    "init": ("config", "init"),
    "train": ("train", "train"),
    "check": ("check", "check"),
    "preencode": ("preencode", "preencode"),
    "generate": ("generate", "generate"),
    "reconstruct": ("reconstruct", "reconstruct"),
    "score-shapes": ("miniature", "score_shapes"),
    "describe": ("describe", "describe"),
    "gpu-check": ("gpu_check", "gpu_check"),
    "evaluate": ("evaluate", "evaluate"),
    "fetch-videos": ("fetch_videos", "fetch_videos"),
    "app": ("app", "serve_app"),
}
_GROUPS = {
    "submit": "launcher.pipelines.cli",
    "jobs": "launcher.jobs.cli",
    **{name: f"tools.{name}" for name in ("shards", "text", "checkpoint", "config", "bench")},
}


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where an error comes from (also REGEN_DEBUG=1).")
    ] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """REGEN: compact video embeddings with a (re-)generative decoder.

    Start with `regen demo`. Help for each command: `regen COMMAND --help`.
    """
    if debug:
        os.environ["REGEN_DEBUG"] = "1"
    if version:
        print(f"regen-dist {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


def _register() -> None:
    for name, (module, function) in _COMMANDS.items():
        app.command(name)(getattr(import_module(f"tools.{module}"), function))
    for name, module in _GROUPS.items():
        app.add_typer(import_module(module).app, name=name)
    for group in (app, *(each.typer_instance for each in app.registered_groups)):
        for command in group.registered_commands if group else ():
            command.callback = _with_local_paths(command.callback) if command.callback else None


def _with_local_paths(command: Callable[..., object]) -> Callable[..., object]:
    """Return a command that refuses a URL where it takes a path, of which `s3://bucket` would be a folder `s3:`, and
    expands a `~`, which shells leave in `--out=~/folder`."""

    @functools.wraps(command)
    def checked(**values: object) -> object:
        for name, value in values.items():
            if isinstance(value, Path) and value.parts[:1] == ("~",):
                values[name] = value.expanduser()
            elif isinstance(value, Path) and ":/" in str(value):
                from regen_dist.config.urls import named_url

                if url := named_url(value):
                    raise ConfigError(
                        f"{name}: {url} is a URL, and this takes a path on this machine; download what is there "
                        "first, or write to a local folder and copy that"
                    )
        return command(**values)

    return checked


_register()


def main() -> None:
    """Entry point: user-facing errors become one message on stderr and an exit code."""
    # Python's 700 make a twelfth of a rank's start a search for garbage that imports do not make.
    gc.set_threshold(10_000)
    start_safely()
    print_any_text()
    shield_stderr()
    with errors_in_one_line(), flushing_stdout():
        app(prog_name="regen")


if __name__ == "__main__":
    main()
