"""`regen shards build`: videos to a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tools.shards.progress import progress_bar

if TYPE_CHECKING:
    from regen_dist.data.manifest import Manifest


def build(
    sources: Annotated[
        list[Path], typer.Argument(help="Video files, and folders to search for them.", metavar="SOURCE…")
    ],
    out: Annotated[str, typer.Option(help="Folder or URL of the dataset; empty, or begun by this same command.")],
    segment_seconds: Annotated[float, typer.Option(help="Length of a sample.")] = 4.0,
    short_side: Annotated[int, typer.Option(help="Resize the short side to this many pixels; 0 keeps the size.")] = 128,
    crf: Annotated[int, typer.Option(help="Quality of x264: 0 (best) to 51.")] = 18,
    keep: Annotated[
        bool, typer.Option("--keep", help="Store whole files as they are: no cutting, no encoding.")
    ] = False,
    samples_per_shard: Annotated[int, typer.Option(help="Samples in one tar.")] = 64,
    min_frames: Annotated[int, typer.Option(help="Leave out what is shorter: a clip of k = 32 needs 33.")] = 33,
    start_seconds: Annotated[float, typer.Option(help="Leave out the beginning of every source.")] = 0.0,
    max_seconds: Annotated[float | None, typer.Option(help="Use at most this much of every source.")] = None,
    captions: Annotated[Path | None, typer.Option(help="CSV or JSONL with the columns video and caption.")] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes; all cores by default, 0 works in this process.")
    ] = None,
) -> None:
    """Cut videos into samples, encode them, write tars and indices. The same command again finishes a killed build.

    Example: regen shards build runs/videos --out runs/shards --short-side 128
    """
    from regen_dist.data.plan import BuildOptions
    from regen_dist.data.shards import build_shards

    options = BuildOptions(
        segment_seconds=segment_seconds,
        short_side=short_side or None,
        crf=crf,
        keep=keep,
        samples_per_shard=samples_per_shard,
        min_frames=min_frames,
        start_seconds=start_seconds,
        max_seconds=max_seconds,
    )
    with progress_bar() as progress:
        built = build_shards(sources, out, options, captions=captions, workers=workers, progress=progress)
    _print_summary(built.manifest, built.shards_made, out)


def _print_summary(manifest: Manifest, made: int, out: str) -> None:
    totals = manifest.totals
    typer.echo(
        f"{out}: {totals.samples} samples, {totals.seconds:.0f} s of video, {totals.bytes / 1e6:.1f} MB in "
        f"{totals.shards} shards "
        f"({made} made now), {len(manifest.skipped)} left out"
    )
    for skip in manifest.skipped[:10]:
        typer.echo(
            f"  left out: {skip.source}{'' if skip.segment is None else f' segment {skip.segment}'}: {skip.reason}"
        )
    if len(manifest.skipped) > 10:
        typer.echo(f"  and {len(manifest.skipped) - 10} more, listed in manifest.json")
