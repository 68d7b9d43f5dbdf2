"""`regen shards build`: videos to a dataset."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer

from tools.shards.progress import progress_bar
from tools.shards.stopping import stopping_cleanly
from tools.shards.task import parse_task

if TYPE_CHECKING:
    from regen_dist.data.dataset.manifest import Manifest

_SHOWN = 10
HDR_HELP = "High dynamic range and wide primaries (PQ, HLG, BT.2020, P3): tone-map to BT.709, or leave-out."
INTERLACED_HELP = "Frames that consist of two fields: deinterlace, or leave-out."


def build(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Videos, folders, prefixes of buckets (s3://…), https:// and hf://, and lists (.csv, .json, .jsonl, "
            ".parquet) with the columns video and caption.",
            metavar="SOURCE…",
        ),
    ],
    out: Annotated[str, typer.Option(help="Folder or URL of the dataset; empty, or begun by this same command.")],
    segment_seconds: Annotated[float, typer.Option(help="Length of a sample, at most.")] = 4.0,
    short_side: Annotated[int, typer.Option(help="Resize the short side to this many pixels; 0 keeps the size.")] = 128,
    crf: Annotated[int, typer.Option(help="Quality of x264: 0 (best) to 51.")] = 18,
    keep: Annotated[
        bool, typer.Option("--keep", help="Store whole files as they are: no cutting, no encoding.")
    ] = False,
    scenes: Annotated[
        bool, typer.Option(help="Cut at scene changes, measure motion; without it samples may hold cuts.")
    ] = True,
    scene_threshold: Annotated[float, typer.Option(help="Change between two frames that is a cut.")] = 27.0,
    min_motion: Annotated[float, typer.Option(help="Leave out what changes less from frame to frame.")] = 0.15,
    min_frames: Annotated[int, typer.Option(help="Leave out what is shorter: a clip of k = 32 needs 33.")] = 33,
    min_side: Annotated[int | None, typer.Option(help="Leave out sources with a shorter side.")] = None,
    max_aspect: Annotated[
        float | None, typer.Option(help="Leave out sources whose long side is more times the short.")
    ] = None,
    hdr: Annotated[str, typer.Option(help=HDR_HELP)] = "tone-map",
    interlaced: Annotated[str, typer.Option(help=INTERLACED_HELP)] = "deinterlace",
    start_seconds: Annotated[float, typer.Option(help="Leave out the beginning of every source.")] = 0.0,
    max_seconds: Annotated[float | None, typer.Option(help="Use at most this much of every source.")] = None,
    captions: Annotated[
        str | None,
        typer.Option(help="List with the columns video and caption, for folders. NAME.txt beside also does."),
    ] = None,
    columns: Annotated[
        str | None, typer.Option(help="Columns of the lists under other names: video=COLUMN,caption=COLUMN.")
    ] = None,
    shard_mb: Annotated[float, typer.Option(help="Size at which a tar is closed.")] = 256.0,
    samples_per_shard: Annotated[int | None, typer.Option(help="Samples in one tar, at most.")] = None,
    part_gb: Annotated[float, typer.Option(help="Sources that are planned and made at a time.")] = 4.0,
    max_bad_share: Annotated[float, typer.Option(help="Stop when more of many sources cannot be read.")] = 0.5,
    task: Annotated[
        str, typer.Option(help="Make every N-th part from the I-th (from 0), I/N; slurm: as its array says.")
    ] = "0/1",
    workers: Annotated[
        int | None, typer.Option(help="Processes; all cores by default, 0 works in this process.")
    ] = None,
) -> None:
    """Cut videos into samples, encode them, write tars and indices. The same command again finishes a killed build.

    Example: regen shards build runs/videos --out runs/shards --short-side 128
    """
    from regen_dist.data.making.build import build_shards
    from regen_dist.data.making.captions import Columns
    from regen_dist.data.making.plan import BuildOptions

    options = BuildOptions(
        segment_seconds=segment_seconds,
        short_side=short_side or None,
        crf=crf,
        keep=keep,
        scenes=scenes,
        scene_threshold=scene_threshold,
        min_motion=min_motion,
        min_frames=min_frames,
        min_side=min_side,
        max_aspect=max_aspect,
        hdr=hdr,
        interlaced=interlaced,
        start_seconds=start_seconds,
        max_seconds=max_seconds,
        shard_mb=shard_mb,
        samples_per_shard=samples_per_shard,
        part_gb=part_gb,
    )
    with stopping_cleanly(), progress_bar() as progress:
        built = build_shards(
            sources,
            out,
            options,
            captions=captions,
            columns=Columns.parse(columns) if columns is not None else None,
            task=parse_task(task),
            workers=workers,
            max_bad_share=max_bad_share,
            progress=progress,
        )
    if built.manifest is None:
        typer.echo(
            f"{out}: {built.shards_made} shards made now; {built.parts_missing} of {built.parts} parts are left to "
            "other tasks"
        )
    else:
        _print_summary(built.manifest, built.shards_made, out)


def _print_summary(manifest: Manifest, made: int, out: str) -> None:
    totals, skipped = manifest.totals, manifest.skipped
    typer.echo(
        f"{out}: {totals.samples} samples, {totals.seconds:.0f} s of video, {totals.bytes / 1e6:.1f} MB in "
        f"{totals.shards} shards ({made} made now), {len(skipped)} left out"
    )
    print_notes(manifest)
    if not skipped:
        return
    for kind, number in Counter(skip.reason.partition(":")[0] for skip in skipped).most_common():
        typer.echo(f"{number:8d}  {kind}")
    for skip in skipped[:_SHOWN]:
        part = "" if skip.segment is None else f" segment {skip.segment}"
        typer.echo(f"  left out: {skip.source}{part}: {skip.reason}")
    if len(skipped) > _SHOWN:
        typer.echo(f"  and {len(skipped) - _SHOWN} more, listed in manifest.json")


def print_notes(manifest: Manifest) -> None:
    """Count what was converted, by kind; manifest.json names each source."""
    for kind, number in Counter(note.note.partition(":")[0] for note in manifest.notes).most_common():
        typer.echo(f"Converted, {kind}: {number} sources; manifest.json says how under notes")
