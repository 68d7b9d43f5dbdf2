"""`regen shards verify`: whether a dataset is what was written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from regen_dist.errors import DataError
from tools.shards.progress import progress_bar

if TYPE_CHECKING:
    from regen_dist.data.inspection.checking import Depth

_MEND = {
    "index": "copy the tars named again from where they came; remove the indices that are bad, or whose tars were "
    "changed on purpose, and run `regen shards index` again",
    "build": "remove the shards named, with their indices, and run the build again",
    "synthetic": "remove the shards named, with their indices, and run `regen shards synthetic` again",
    "latents": "remove the shards named, with their indices, and run `regen preencode` again",
}
_CHECKED: dict[Depth, str] = {
    "quick": "every object is there and has its size (no byte was read)",
    "bytes": "everything is as it was written",
    "deep": "everything is as it was written, and every frame decodes",
}
_UNPACKED = "everything is as it was written, and all latents unpack"


def verify(
    url: Annotated[str, typer.Argument(help="Folder or URL of a dataset.", metavar="URL")],
    quick: Annotated[bool, typer.Option("--quick", help="List the objects and compare sizes; read no shard.")] = False,
    deep: Annotated[bool, typer.Option("--deep", help="Also decode every frame, or unpack all latents.")] = False,
    workers: Annotated[
        int | None, typer.Option(help="Processes; all cores by default, 0 works in this process.")
    ] = None,
) -> None:
    """Check every shard, index and sample against its checksum. Names what is bad, and ends with exit code 3 then.

    Example: regen shards verify runs/shards --deep
    """
    from regen_dist.data.inspection.checking import verify_dataset

    if quick and deep:
        raise typer.BadParameter("--quick and --deep exclude each other")
    depth: Depth = "quick" if quick else "deep" if deep else "bytes"
    with progress_bar() as progress:
        verdict = verify_dataset(url, depth, workers=workers, progress=progress)
    for note in verdict.notes:
        typer.echo(f"Note: {note}")
    if verdict.bad:
        title = f"{len(verdict.bad)} problems in {url}; {_MEND[verdict.manifest.kind]}:"
        raise DataError("\n".join([title, *verdict.bad]))
    totals = verdict.manifest.totals
    checked = _UNPACKED if depth == "deep" and verdict.manifest.kind == "latents" else _CHECKED[depth]
    typer.echo(f"{url}: {checked}: {totals.samples} samples in {totals.shards} shards")
