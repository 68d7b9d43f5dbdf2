"""`regen shards index`: a dataset out of WebDataset tars that others wrote."""

from __future__ import annotations

from typing import Annotated

import typer

from tools.shards.build import HDR_HELP, INTERLACED_HELP, print_notes
from tools.shards.progress import progress_bar


def index(
    url: Annotated[str, typer.Argument(help="Folder or URL; every *.tar below it is a shard.", metavar="URL")],
    out: Annotated[
        str | None, typer.Option(help="Where the indices go when URL cannot be written to; the tars stay.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes; all cores by default, 0 works in this process.")
    ] = None,
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Leave out tars that cannot be read to their end.")
    ] = False,
    hdr: Annotated[str, typer.Option(help=HDR_HELP)] = "tone-map",
    interlaced: Annotated[str, typer.Option(help=INTERLACED_HELP)] = "deinterlace",
) -> None:
    """Make the index of WebDataset tars that others wrote, so that they can be trained from. Every tar is read once.

    The same command again finishes what was killed, and takes in new tars. Exit code 3: tars are broken.

    Example: regen shards index s3://bucket/videos --out runs/videos-index
    """
    from regen_dist.data.dataset.manifest import listed
    from regen_dist.data.making.foreign import index_tars
    from regen_dist.data.video.conversion import LeftOut

    unwanted = LeftOut.of(hdr, interlaced)
    with progress_bar() as progress:
        made = index_tars(url, out, workers=workers, skip_broken=skip_broken, unwanted=unwanted, progress=progress)
    manifest, totals = made.manifest, made.manifest.totals
    typer.echo(
        f"{out or url}: {totals.samples} samples, {totals.seconds:.0f} s of video, {totals.bytes / 1e6:.1f} MB in "
        f"{totals.shards} shards ({made.shards_made} indexed now), {len(manifest.skipped)} left out"
    )
    if manifest.skipped:
        typer.echo(
            f"Left out (all are in manifest.json, `regen shards inspect` counts them):\n{listed(manifest.skipped)}"
        )
    print_notes(manifest)
