"""`regen checkpoint verify`: whether checkpoints are as they were written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from regen_dist.errors import CheckpointError
from tools.checkpoint.place import RUN, progress_bar

if TYPE_CHECKING:
    from regen_dist.checkpoint.tending import Entry


def verify(
    run: Annotated[str, RUN],
    step: Annotated[int | None, typer.Option(help="Check this checkpoint alone.", min=0)] = None,
) -> None:
    """Read every byte of every committed checkpoint, and compare it with what was written. Names each damaged file,
    and ends with exit code 4 then.

    Example: regen checkpoint verify runs/demo
    """
    from regen_dist.checkpoint.tending import check, dangling_pointer, open_place

    place = open_place(run)
    pointer = dangling_pointer(place)
    bad = [] if pointer is None or step is not None else [pointer]
    with progress_bar() as progress:
        for entry in check(place, step, lambda step, done, total: progress(f"step {step}", done, total)):
            typer.echo(_line(entry))
            bad += [f"step {entry.step}: {problem}" for problem in entry.problems]
    if bad:
        title = (
            f"{len(bad)} problem{'s' if len(bad) > 1 else ''} in {place.folder.url}; copy the files named again from "
            "where they are whole, or delete their checkpoints (a run goes on from the newest whole one by itself):"
        )
        raise CheckpointError("\n".join([title, *(f"  {each}" for each in bad)]))


def _line(entry: Entry) -> str:
    if entry.manifest is None:
        return f"step {entry.step}: DAMAGED, its manifest cannot be read"
    size = f"{len(entry.manifest.files)} files, {entry.manifest.size_bytes / 1e6:,.1f} MB"
    return f"step {entry.step}: {f'DAMAGED, {len(entry.problems)} of its' if entry.problems else 'ok,'} {size}"
