"""`regen shards captions`: prompts out of a dataset."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from regen_dist.data.dataset.catalogue import Dataset


def captions(
    url: Annotated[str, typer.Argument(help="Folder or URL of a dataset.", metavar="URL")],
    out: Annotated[Path, typer.Option(help="Text file to write, one caption a line.")],
    number: Annotated[int, typer.Option(min=1, help="How many, of the first samples that have one.")] = 200,
) -> None:
    """Write the captions of a dataset's first samples, as prompts for `regen generate --prompts`.

    Example: regen shards captions runs/shapes/held_out --out runs/prompts.txt --number 200
    """
    from regen_dist.config.files import write_text_atomically
    from regen_dist.data.dataset.catalogue import open_dataset
    from regen_dist.errors import DataError

    found = list(islice(_captions(open_dataset(url)), number))
    if not found:
        raise DataError(f"{url}: no sample has a caption; build the dataset with captions, or give another")
    write_text_atomically(out, "".join(f"{caption}\n" for caption in found))
    fewer = f" (fewer than the {number} that were asked for: no more samples have one)" if len(found) < number else ""
    typer.echo(f"{out}: {len(found)} captions of {url}{fewer}")


def _captions(dataset: Dataset) -> Iterator[str]:
    """In the dataset's order, each on one line; an index is read when its shard is reached."""
    from regen_dist.data.dataset.index import read_index

    for shard in dataset.manifest.shards:
        table, _ = read_index(dataset.store.get(shard.index))
        texts = (" ".join((caption or "").split()) for caption in table["caption"].to_pylist())
        yield from filter(None, texts)
