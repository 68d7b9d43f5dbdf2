"""`regen shards frames`: lossless videos from folders of pictures and raw files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def frames(
    source: Annotated[Path, typer.Argument(help="Folder with folders of pictures, or with .yuv files.")],
    out: Annotated[Path, typer.Option(help="Folder of the videos; existing ones are kept.")],
    fps: Annotated[float | None, typer.Option(help="Frames a second; NAME_WIDTHxHEIGHT_FPS.yuv says its own.")] = None,
) -> None:
    """Encode every folder of pictures and every raw YUV 4:2:0 file below a folder as a lossless video.

    Example: regen shards frames DAVIS/JPEGImages/480p --out runs/davis --fps 24
    """
    from regen_dist.data.build.assembling import assemble, sequences_below
    from regen_dist.errors import DataError

    if not source.is_dir():
        raise DataError(f"{source}: no such folder; give the folder of the pictures")
    out.mkdir(parents=True, exist_ok=True)
    for one in sequences_below(source):
        relative = one.relative_to(source)
        name = "-".join(relative.with_suffix("").parts if one.is_file() else relative.parts) or source.resolve().name
        target = out / f"{name}.mkv"
        if target.exists():
            typer.echo(f"{target}: is there")
        else:
            typer.echo(f"{target}: {assemble(one, target, fps)} frames")
