"""`regen shards`: make, look at and check datasets of WebDataset tars with an index."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from regen_dist.errors import DataError

if TYPE_CHECKING:
    from rich.table import Table

    from regen_dist.data.index import Dataset, Manifest
    from regen_dist.data.shards import Progress

app = typer.Typer(name="shards", help="Build, inspect and verify datasets.", no_args_is_help=True)


@app.command()
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
    with _progress() as progress:
        built = build_shards(sources, out, options, captions=captions, workers=workers, progress=progress)
    _print_summary(built.manifest, built.shards_made, out)


@app.command()
def inspect(url: Annotated[str, typer.Argument(help="Folder or URL of a dataset.", metavar="URL")]) -> None:
    """Show what a dataset holds.

    Example: regen shards inspect runs/shards
    """
    from rich.console import Console

    from regen_dist.data.index import open_dataset

    Console().print(_table(open_dataset(url)))


@app.command()
def verify(url: Annotated[str, typer.Argument(help="Folder or URL of a dataset.", metavar="URL")]) -> None:
    """Check every shard's size and every sample's checksum. Ends with exit code 3 when something is bad.

    Example: regen shards verify runs/shards
    """
    from regen_dist.data.shards import verify_dataset

    with _progress() as progress:
        bad = verify_dataset(url, progress)
    if bad:
        raise DataError(
            "\n".join([f"{len(bad)} problems in {url}; remove the shards named and run the build again:", *bad])
        )
    typer.echo(f"{url}: everything is as it was written")


@contextmanager
def _progress() -> Iterator[Progress]:
    """A live bar on stderr, one line a stage."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<7}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        yield show


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


def _table(dataset: Dataset) -> Table:
    from rich.table import Table

    totals, manifest = dataset.manifest.totals, dataset.manifest
    table = Table(title=dataset.store.url, show_header=False)
    columns = {
        name: dataset.table[name].to_pylist() for name in ("frames", "height", "width", "fps", "caption", "source")
    }
    rows = {
        "samples": f"{totals.samples} from {len(set(columns['source']))} sources",
        "length": f"{totals.seconds:.1f} s, {totals.frames} frames",
        "size": f"{totals.bytes / 1e6:.1f} MB in {totals.shards} shards",
        "frames": _range(columns["frames"]),
        "height": _range(columns["height"]),
        "width": _range(columns["width"]),
        "fps": _range([round(fps, 3) for fps in columns["fps"]]),
        "captions": f"{sum(caption is not None for caption in columns['caption'])} samples have one",
        "left out": f"{len(manifest.skipped)} (see manifest.json)",
        "options": ", ".join(f"{name}={value}" for name, value in manifest.options.items()),
        "fingerprint": manifest.fingerprint,
    }
    for name, text in rows.items():
        table.add_row(name, text)
    return table


def _range(values: list[float]) -> str:
    """The lowest, the median and the highest of some values."""
    ordered = sorted(values)
    low, middle, high = ordered[0], ordered[len(ordered) // 2], ordered[-1]
    return f"{low}" if low == high else f"{low} to {high}, median {middle}"
