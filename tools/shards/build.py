"""`regen shards build`, `index` and `synthetic`: create datasets."""

from __future__ import annotations

from collections import Counter
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from regen_dist.tables import counted
from tools.shards.progress import Workers, parse_task, progress_bar, stopping_cleanly

if TYPE_CHECKING:
    from regen_dist.data.format.manifest import DatasetManifest


HDR_HELP = "High dynamic range and wide primaries (PQ, HLG, BT.2020, P3): tone-map to BT.709, or leave-out."
INTERLACED_HELP = "Interlaced frames (two fields): deinterlace, or leave-out."


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
    segment_seconds: Annotated[float, typer.Option(help="Maximum length of a sample.")] = 4.0,
    short_side: Annotated[int, typer.Option(help="Resize the short side to this many pixels; 0 keeps the size.")] = 128,
    crf: Annotated[int, typer.Option(help="Quality of x264: 0 (best) to 51.")] = 18,
    keep: Annotated[bool, typer.Option("--keep", help="Store whole files unchanged: no cutting, no encoding.")] = False,
    scenes: Annotated[
        bool, typer.Option(help="Cut at scene changes and measure motion; otherwise samples may contain cuts.")
    ] = True,
    scene_threshold: Annotated[float, typer.Option(help="Change between two frames that counts as a cut.")] = 27.0,
    min_motion: Annotated[float, typer.Option(help="Leave out samples with less change between frames.")] = 0.15,
    min_frames: Annotated[int, typer.Option(help="Leave out shorter samples: a clip of k = 32 needs 33.")] = 33,
    min_side: Annotated[int | None, typer.Option(help="Leave out sources with a shorter side.")] = None,
    max_aspect: Annotated[
        float | None, typer.Option(help="Leave out sources with a larger ratio of long to short side.")
    ] = None,
    hdr: Annotated[str, typer.Option(help=HDR_HELP)] = "tone-map",
    interlaced: Annotated[str, typer.Option(help=INTERLACED_HELP)] = "deinterlace",
    start_seconds: Annotated[float, typer.Option(help="Skip the beginning of every source.")] = 0.0,
    max_seconds: Annotated[float | None, typer.Option(help="Maximum use of every source.")] = None,
    captions: Annotated[
        str | None,
        typer.Option(help="List with the columns video and caption, for folders; or NAME.txt beside a video."),
    ] = None,
    columns: Annotated[
        str | None, typer.Option(help="Names of the columns in the lists: video=COLUMN,caption=COLUMN.")
    ] = None,
    shard_mb: Annotated[float, typer.Option(help="Size at which a tar is closed.")] = 256.0,
    samples_per_shard: Annotated[int | None, typer.Option(help="Maximum number of samples in a tar.")] = None,
    part_gb: Annotated[float, typer.Option(help="Size of the parts in which sources are planned and built.")] = 4.0,
    max_bad_share: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Stop when a larger share of the sources is unreadable.")
    ] = 0.5,
    task: Annotated[
        str, typer.Option(help="Build every N-th part from the I-th (from 0), I/N; slurm: by the array index.")
    ] = "0/1",
    workers: Workers = None,
) -> None:
    """Cut videos into samples, encode them, write tars and indices. The same command finishes an interrupted build.

    Example: regen shards build runs/videos --out runs/shards --short-side 128
    """
    from regen_dist.data.build.build import build_shards
    from regen_dist.data.build.lists import Columns
    from regen_dist.data.build.segments import BuildOptions

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


def _print_summary(manifest: DatasetManifest, made: int, out: str) -> None:
    typer.echo(f"{out}: {_totals(manifest)} ({made} made now), {manifest.num_skipped:,} left out")
    print_notes(manifest)
    kinds: Counter[str] = Counter()
    for reason, number in manifest.reasons().items():
        kinds[reason.partition(":")[0]] += number
    for kind, number in kinds.most_common():
        typer.echo(f"{number:8d}  {kind}")
    print_skipped(manifest)


def _totals(manifest: DatasetManifest) -> str:
    """Describe samples, seconds, bytes and shards of a dataset in one line."""
    totals = manifest.totals
    samples, shards = counted(totals.samples, "sample"), counted(totals.shards, "shard")
    return f"{samples}, {totals.seconds:.0f} s of video, {totals.bytes / 1e6:.1f} MB in {shards}"


def print_skipped(manifest: DatasetManifest) -> None:
    """Print the first sources that were left out, each with its reason."""
    from regen_dist.data.format.manifest import listed

    if manifest.skipped:
        number = "all" if manifest.skipped_counts is None else f"the first {len(manifest.skipped):,}"
        first = listed(manifest.skipped, manifest.num_skipped)
        typer.echo(f"Left out ({number} are in manifest.json, `regen shards inspect` counts them):\n{first}")


def print_notes(manifest: DatasetManifest) -> None:
    """Print the number of conversions by kind; manifest.json names each source."""
    for kind, number in manifest.conversions().items():
        typer.echo(f"Converted, {kind}: {counted(number, 'source')}; manifest.json says how under notes")


# `regen shards index`: index existing WebDataset tars.


def index(
    url: Annotated[str, typer.Argument(help="Folder or URL; every *.tar below it is a shard.", metavar="URL")],
    out: Annotated[str | None, typer.Option(help="Location of the indices if URL is read-only; the tars stay.")] = None,
    workers: Workers = None,
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Leave out tars that cannot be read to their end.")
    ] = False,
    hdr: Annotated[str, typer.Option(help=HDR_HELP)] = "tone-map",
    interlaced: Annotated[str, typer.Option(help=INTERLACED_HELP)] = "deinterlace",
) -> None:
    """Build the index of existing WebDataset tars, so that they can be used for training. Every tar is read once.

    The same command finishes an interrupted run and adds new tars. Exit code 3: tars are broken.

    Example: regen shards index s3://bucket/videos --out runs/videos-index
    """
    from regen_dist.data.build.foreign import index_tars
    from regen_dist.data.video.conversion import LeftOut

    unwanted = LeftOut.of(hdr, interlaced)
    with stopping_cleanly(), progress_bar() as progress:
        made = index_tars(url, out, workers=workers, skip_broken=skip_broken, unwanted=unwanted, progress=progress)
    manifest = made.manifest
    typer.echo(f"{out or url}: {_totals(manifest)} ({made.shards_made} indexed now), {manifest.num_skipped:,} left out")
    print_skipped(manifest)
    print_notes(manifest)


# `regen shards synthetic`: captioned moving shapes.


class Split(StrEnum):
    """Subset of the combinations of colour, shape and direction."""

    ALL = "all"
    TRAIN = "train"
    HELD_OUT = "held-out"


def synthetic(
    out: Annotated[str, typer.Option(help="Folder or URL of the dataset; empty, or begun by this same command.")],
    number: Annotated[int, typer.Option(help="Number of clips.")],
    seed: Annotated[int, typer.Option(help="Seed of the clips.")],
    side: Annotated[int, typer.Option(help="Height and width in pixels; even, at least 32.")] = 64,
    frames: Annotated[int, typer.Option(help="Frames per clip.")] = 33,
    fps: Annotated[float, typer.Option(help="Frames per second.")] = 24.0,
    crf: Annotated[int, typer.Option(help="Quality of x264: 0 (best) to 51.")] = 8,
    split: Annotated[
        Split, typer.Option(help="All combinations of colour, shape and direction, or one of two parts.")
    ] = Split.ALL,
    held_out_share: Annotated[float, typer.Option(help="Share of combinations left out of the train split.")] = 0.15,
    backgrounds: Annotated[
        str | None, typer.Option(help="Backgrounds, such as black,grey,white; all by default.")
    ] = None,
    samples_per_shard: Annotated[int, typer.Option(help="Maximum number of clips in a tar.")] = 1024,
    shard_mb: Annotated[int, typer.Option(help="Maximum size of a tar in MB.")] = 256,
    workers: Workers = None,
    task: Annotated[
        str, typer.Option(help="Build every N-th shard from the I-th (from 0), I/N; slurm: by the array index.")
    ] = "0/1",
) -> None:
    """Render captioned moving shapes as H.264 files. The same command finishes an interrupted build.

    Example: regen shards synthetic --out runs/shapes --number 2000 --seed 1 --split train
    """
    from regen_dist.data.synthetic.dataset import build_synthetic
    from regen_dist.data.synthetic.shapes import SyntheticOptions

    options = SyntheticOptions(
        number, seed, side, frames, fps, crf, split.value, held_out_share, samples_per_shard=samples_per_shard,
        shard_mb=shard_mb, **({} if backgrounds is None else {"backgrounds": tuple(backgrounds.split(","))}),
    )  # fmt: skip
    with stopping_cleanly(), progress_bar() as progress:
        made = build_synthetic(out, options, task=parse_task(task), workers=workers, progress=progress)
    if made.manifest is None:
        typer.echo(f"{out}: {made.shards_made} shards made; {made.samples_missing} samples are left to other tasks")
        return
    typer.echo(f"{out}: {_totals(made.manifest)} ({made.shards_made} made now)")
