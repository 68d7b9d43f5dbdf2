"""`regen checkpoint list`: which checkpoints a run has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from regen_dist.jsontext import json_text
from tools.checkpoint.place import RUN

if TYPE_CHECKING:
    from rich.table import Table

    from regen_dist.checkpoint.tending import Entry, Place


def list_checkpoints(
    run: Annotated[str, RUN],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Show the committed checkpoints of a run, what is wrong with them as far as sizes tell, and what was never
    committed.

    Example: regen checkpoint list runs/demo
    """

    from rich.console import Console

    from regen_dist.checkpoint.tending import dangling_pointer, entries, open_place

    place = open_place(run)
    found, debris, pointer = entries(place), place.folder.debris(), dangling_pointer(place)
    if as_json:
        content = {"url": place.folder.url, "checkpoints": [each.to_json() for each in found]}
        typer.echo(json_text(content | {"debris": debris, "pointer_problem": pointer}, indent=1))
        return
    console = Console()
    if found:
        console.print(_table(place, found))
        for entry in found:
            for problem in entry.problems:
                console.print(f"step {entry.step}: {problem}", highlight=False, markup=False, soft_wrap=True)
    else:
        console.print(f"{place.folder.url} holds no committed checkpoint", highlight=False, soft_wrap=True)
    if pointer:
        console.print(f"Note: {pointer}", highlight=False, markup=False, soft_wrap=True)
    for name, size in debris.items():
        console.print(f"never committed: {name}, {size:,} bytes", highlight=False, markup=False, soft_wrap=True)
    if debris:
        console.print("The next save clears it, and so does `regen checkpoint prune`.", highlight=False)


def _table(place: Place, found: list[Entry]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    metric = "psnr_db" if place.policy is None else place.policy.best_metric
    table = Table(title=place.folder.url, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))  # fits in 80 columns
    for name in ("step", "samples", "saved (UTC)", "MB", "ranks", metric):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("marks")
    for entry in found:
        table.add_row(*_facts(entry, metric), "damaged" if entry.problems else "ok", ", ".join(entry.marks))
    return table


def _facts(entry: Entry, metric: str) -> list[str]:
    manifest = entry.manifest
    if manifest is None:
        return [str(entry.step), *[""] * 5]
    value = manifest.metrics.get(metric)
    return [
        f"{entry.step}",
        f"{manifest.samples:,}",
        manifest.saved_at[:16].replace("T", " "),
        f"{manifest.size_bytes / 1e6:,.1f}",
        f"{manifest.world_size}",
        "" if value is None else f"{value:.4g}",
    ]
