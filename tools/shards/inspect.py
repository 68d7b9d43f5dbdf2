"""`regen shards inspect`: what a dataset holds, in numbers and pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from regen_dist.jsontext import json_text
from tools.shards.progress import progress_bar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from regen_dist.data.dataset.catalogue import Dataset
    from regen_dist.data.inspection.overview import Overview
    from regen_dist.data.inspection.tally import Histogram

_BAR, _REASONS = 30, 12
_LONG = "statistics"  # of latents: dozens of numbers, which --json prints
_EIGHTHS = " ▏▎▍▌▋▊▉"


def inspect(
    url: Annotated[str, typer.Argument(help="Folder or URL of a dataset.", metavar="URL")],
    sheet: Annotated[
        Path | None, typer.Option(help="Where the contact sheet (PNG) goes; into the cache folder by default.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Samples on the contact sheet; 0 makes none.", min=0, max=200)] = 12,
    seed: Annotated[
        int | None, typer.Option(help="Draw the samples; by default they are spread evenly.", min=0)
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the numbers as JSON; a sheet is made with --sheet only.")
    ] = False,
) -> None:
    """Show what a dataset holds: a table, histograms, what was left out, and a contact sheet (none of a latent cache).

    Example: regen shards inspect runs/shards --sheet runs/shards.png --samples 12
    """

    from rich.console import Console

    from regen_dist.data.dataset.catalogue import open_dataset
    from regen_dist.data.dataset.manifest import only_videos
    from regen_dist.data.inspection.contact import choose_rows, write_contact_sheet
    from regen_dist.data.inspection.overview import make_overview

    dataset = open_dataset(url)
    if sheet:
        only_videos(dataset.manifest, url)
    with progress_bar() as progress:
        overview = make_overview(dataset, progress)
    if as_json:
        typer.echo(json_text(overview.to_json(), indent=1, ensure_ascii=False))
    else:
        _show(overview, Console())
    if samples and (sheet or not as_json) and dataset.manifest.kind != "latents":
        path = sheet or _default_sheet(dataset)
        write_contact_sheet(dataset, path, choose_rows(len(dataset), samples, seed))
        typer.echo(f"Contact sheet: {path}", err=as_json)


def _default_sheet(dataset: Dataset) -> Path:
    """Not in the dataset, which may lie in a bucket, nor wherever the user happens to stand."""
    from regen_dist.data.dataset.catalogue import cache_folder

    name = dataset.store.url.rstrip("/").rpartition("/")[2]
    return cache_folder() / "sheets" / f"{name}-{dataset.fingerprint[:8]}.png"


def _show(overview: Overview, console: Console) -> None:
    console.print(_table(overview))
    width = max((len(bar.label) for shown in overview.histograms.values() for bar in shown.bars), default=0)
    digits = max((len(f"{bar.count:,}") for shown in overview.histograms.values() for bar in shown.bars), default=0)
    for name, shown in overview.histograms.items():
        console.print(f"\n[bold]{name}[/bold]{_spread(shown)}", highlight=False)
        for line in _bars(shown, width, digits):
            console.print(line, highlight=False, markup=False)
    if overview.left_out:
        console.print("\n[bold]left out[/bold], by reason", highlight=False)
        for reason, count in overview.left_out[:_REASONS]:
            console.print(f"  {count:>{digits},}  {reason}", highlight=False, markup=False, soft_wrap=True)
        if len(overview.left_out) > _REASONS:
            console.print(f"  and {len(overview.left_out) - _REASONS} more reasons (--json lists all)")


def _table(overview: Overview) -> Table:
    from rich.table import Table

    totals = overview.totals
    sources = "" if overview.sources is None else f" from {overview.sources:,} sources"
    table = Table(title=overview.url, show_header=False)
    rows = {
        "made by": "regen preencode" if overview.kind == "latents" else f"regen shards {overview.kind}",
        "samples": f"{totals.samples:,}{sources}",
        "length": f"{_duration(totals.seconds)}, {totals.frames:,} frames",
        "size": f"{totals.bytes / 1e6:,.1f} MB in {totals.shards:,} shards",
        "shards lie in": overview.shards_url or "",
        "captions": f"{overview.captions:,} samples have one",
        "left out": f"{sum(count for _, count in overview.left_out):,}",
        "options": ", ".join(f"{name}={value}" for name, value in overview.options.items() if name != _LONG),
        "fingerprint": overview.fingerprint,
    }
    for name, text in rows.items():
        if text:
            table.add_row(name, text)
    return table


def _duration(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:.1f} s"
    minutes, hours = int(seconds) // 60 % 60, int(seconds) // 3600
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min"


def _spread(shown: Histogram) -> str:
    if shown.low is None or shown.low == shown.high:
        return ""
    return f"  {shown.low:g} to {shown.high:g}, median {shown.median:g}"


def _bars(shown: Histogram, width: int, digits: int) -> Iterator[str]:
    """A line for each bar: label, bar, count, share. Widths in characters."""
    most, total = max(bar.count for bar in shown.bars), sum(bar.count for bar in shown.bars)
    for bar in shown.bars:
        eighths = max(round(bar.count / most * _BAR * 8), 1 if bar.count else 0)
        drawn = "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
        yield f"  {bar.label:>{width}}  {drawn:<{_BAR}}  {bar.count:>{digits},} {bar.count / total:>6.1%}"
