"""`regen shards synthetic`: captioned moving shapes."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from tools.shards.progress import progress_bar
from tools.shards.stopping import stopping_cleanly
from tools.shards.task import parse_task


class Split(StrEnum):
    """Which combinations of colour, shape and direction are shown."""

    ALL = "all"
    TRAIN = "train"
    HELD_OUT = "held-out"


def synthetic(
    out: Annotated[str, typer.Option(help="Folder or URL of the dataset; empty, or begun by this same command.")],
    number: Annotated[int, typer.Option(help="Clips to make.")],
    seed: Annotated[int, typer.Option(help="Another seed gives other clips.")],
    side: Annotated[int, typer.Option(help="Height and width in pixels; even, at least 32.")] = 64,
    frames: Annotated[int, typer.Option(help="Frames of a clip.")] = 33,
    fps: Annotated[float, typer.Option(help="Frames per second.")] = 24.0,
    crf: Annotated[int, typer.Option(help="Quality of x264: 0 (best) to 51.")] = 8,
    split: Annotated[
        Split, typer.Option(help="All combinations of colour, shape and direction, or one of two parts.")
    ] = Split.ALL,
    held_out_share: Annotated[float, typer.Option(help="Share of the combinations that train never shows.")] = 0.15,
    backgrounds: Annotated[
        str | None, typer.Option(help="What shapes move over, such as black,grey,white; all by default.")
    ] = None,
    samples_per_shard: Annotated[int, typer.Option(help="Clips in one tar, at most.")] = 1024,
    shard_mb: Annotated[int, typer.Option(help="Megabytes at which a tar is closed, at the latest.")] = 256,
    workers: Annotated[
        int | None, typer.Option(help="Processes; all cores by default, 0 works in this process.")
    ] = None,
    task: Annotated[
        str, typer.Option(help="Make every N-th shard from the I-th (from 0), I/N; slurm: as its array says.")
    ] = "0/1",
) -> None:
    """Draw captioned moving shapes as H.264 files. The same command again finishes what was killed.

    Example: regen shards synthetic --out runs/shapes --number 2000 --seed 1 --split train
    """
    from regen_dist.data.making.moving_shapes import SyntheticOptions
    from regen_dist.data.making.synthetic import build_synthetic

    options = SyntheticOptions(
        number, seed, side, frames, fps, crf, split.value, held_out_share, samples_per_shard=samples_per_shard,
        shard_mb=shard_mb, **({} if backgrounds is None else {"backgrounds": tuple(backgrounds.split(","))}),
    )  # fmt: skip
    with stopping_cleanly(), progress_bar() as progress:
        made = build_synthetic(out, options, task=parse_task(task), workers=workers, progress=progress)
    if made.manifest is None:
        typer.echo(f"{out}: {made.shards_made} shards made; {made.samples_missing} samples are left to other tasks")
        return
    totals = made.manifest.totals
    typer.echo(
        f"{out}: {totals.samples} samples, {totals.seconds:.0f} s of video, {totals.bytes / 1e6:.1f} MB in "
        f"{totals.shards} shards ({made.shards_made} made now)"
    )
