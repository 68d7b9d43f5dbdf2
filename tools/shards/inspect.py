"""`regen shards inspect`: what a dataset holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from regen_dist.data.catalogue import Dataset


def inspect(url: Annotated[str, typer.Argument(help="Folder or URL of a dataset.", metavar="URL")]) -> None:
    """Show what a dataset holds.

    Example: regen shards inspect runs/shards
    """
    from rich.console import Console

    from regen_dist.data.catalogue import open_dataset

    Console().print(_table(open_dataset(url)))


def _table(dataset: Dataset) -> Table:
    from rich.table import Table

    totals, manifest, table_ = dataset.manifest.totals, dataset.manifest, dataset.table()
    table = Table(title=dataset.store.url, show_header=False)
    columns = {name: table_[name].to_pylist() for name in ("frames", "height", "width", "fps", "caption", "source")}
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
