"""`regen shards verify`: whether a dataset is what was written."""

from __future__ import annotations

from typing import Annotated

import typer

from regen_dist.errors import DataError
from tools.shards.progress import progress_bar


def verify(url: Annotated[str, typer.Argument(help="Folder or URL of a dataset.", metavar="URL")]) -> None:
    """Check every shard's size and every sample's checksum. Ends with exit code 3 when something is bad.

    Example: regen shards verify runs/shards
    """
    from regen_dist.data.shards import verify_dataset

    with progress_bar() as progress:
        bad = verify_dataset(url, progress)
    if bad:
        raise DataError(
            "\n".join([f"{len(bad)} problems in {url}; remove the shards named and run the build again:", *bad])
        )
    typer.echo(f"{url}: everything is as it was written")
