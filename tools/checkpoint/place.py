"""What several subcommands of `regen checkpoint` take and show alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer

RUN: Any = typer.Argument(
    help="Run folder, such as runs/demo; or the folder or URL (s3://…) of its checkpoints.", metavar="RUN"
)


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A live bar on stderr, told (what, how much of it, of how much). It is gone afterwards."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield show
