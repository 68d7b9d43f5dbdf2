"""`regen jobs`: the table, once or again and again."""

from __future__ import annotations

import time
from pathlib import Path

from launcher.jobs.finding import find
from launcher.jobs.queue import Queue, ask
from launcher.jobs.rows import Row, rows
from launcher.jobs.table import print_rows
from regen_dist.errors import ConfigError
from regen_dist.jsontext import json_text


def look(root: Path, *, fold: bool = True) -> tuple[list[Row], list[str]]:
    """The rows of every run under `root`, and what could not be found out.

    Raises:
        ConfigError: there is no such folder.
    """
    if not root.is_dir():
        raise ConfigError(f"{root}: no such folder; give the one that holds the runs by --root")
    found = find(root)
    queue = ask([member for run in found.runs for member in run.members])
    return rows(found, queue, root, fold=fold), [*_silence(queue), *(f"left out: {text}" for text in found.unread)]


def _silence(queue: Queue) -> list[str]:
    if not queue.silence:
        return []
    return [f"Slurm does not answer ({queue.silence}): the states of its jobs are those of their own histories"]


def show(root: Path, *, as_json: bool, fold: bool, every_s: float | None) -> None:
    """Print the table; with `every_s` until Ctrl-C."""
    from rich.console import Console

    console = Console()
    while True:
        found, problems = look(root, fold=fold and not as_json)
        if every_s is not None and console.is_terminal and not as_json:
            console.clear()
        if as_json:
            print(json_text({"runs": [row.to_json() for row in found], "problems": problems}, indent=1), flush=True)
        else:
            _print(console, root, found, problems)
        if every_s is None:
            return
        time.sleep(every_s)


def _print(console: object, root: Path, found: list[Row], problems: list[str]) -> None:
    from rich.console import Console

    assert isinstance(console, Console)
    if found:
        print_rows(console, found)
    else:
        console.print(f"no runs in {root}; `regen submit train CONFIG` starts one", highlight=False, markup=False)
    for problem in problems:
        console.print(f"note: {problem}", highlight=False, markup=False, soft_wrap=True)
