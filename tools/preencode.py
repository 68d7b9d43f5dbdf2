"""`regen preencode`: latent caches from datasets of videos."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from regen_dist.errors import DataError
from regen_dist.tables import counted
from tools.shards.build import print_skipped
from tools.shards.progress import parse_task, progress_bar, stopping_cleanly

if TYPE_CHECKING:
    from regen_dist.config.preencode import PreencodeConfig
    from regen_dist.inference.preencode import Preencoded


def preencode(
    config: Annotated[Path, typer.Argument(help="YAML file under configs/preencode/.", metavar="CONFIG")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Config overrides, as a.b=value.", metavar="[a.b=c …]")
    ] = None,
    task: Annotated[
        str, typer.Option(help="Encode every N-th shard from the I-th (from 0), I/N; slurm: by the array index.")
    ] = "0/1",
    max_bad_share: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Stop when a larger share of a shard's videos cannot be encoded.")
    ] = 0.5,
    verify: Annotated[
        int, typer.Option(min=0, help="Re-encode this many entries of a finished cache and compare them.")
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the choice of entries for --verify.")] = 0,
) -> None:
    """Encode videos clip by clip and embed their captions. The same command finishes an interrupted cache.

    Only the encoder is loaded. A folder begun with other weights, another config or other videos is refused.

    Example: regen preencode configs/preencode/nano.yaml embedder=runs/nano
    """
    from regen_dist.config.preencode import load_preencode_config

    number, count = parse_task(task)
    loaded = load_preencode_config(config, tuple(overrides or ()))  # before torch: config errors are reported quickly
    if verify:
        _verify(loaded, verify, seed)
        return
    from regen_dist.inference.preencode import preencode as encode

    with stopping_cleanly(), progress_bar() as progress:
        made = encode(loaded, task=(number, count), max_bad_share=max_bad_share, progress=progress)
    _print(made, loaded.output)


def _verify(config: PreencodeConfig, samples: int, seed: int) -> None:
    from regen_dist.inference.preencode_verify import verify_cache

    with progress_bar() as progress:
        result = verify_cache(config, samples=samples, seed=seed, progress=progress)
    if result.mismatches:
        title = f"{len(result.mismatches)} of {result.entries} entries in {config.output} are not what is made now:"
        raise DataError("\n".join([title, *result.mismatches]))
    typer.echo(
        f"{config.output}: {result.entries} entries encoded again; all agree (largest difference {result.largest:.2g})"
    )


def _print(made: Preencoded, output: str) -> None:
    if made.shards_made:
        clips, images, cut = made.encoded
        both = f"{counted(clips, 'clip')} and {counted(images, 'image')}"
        typer.echo(f"{both} in {made.seconds:.1f} s: {made.clips_per_s:.1f} a second")
        if cut:
            typer.echo(f"warning: {cut} captions have more tokens than text.max_tokens keeps, and were cut", err=True)
    if made.manifest is None:
        typer.echo(
            f"{output}: {made.shards_made} shards made now; {made.shards_missing} of {made.shards} are left to other "
            "tasks"
        )
        return
    totals, options = made.manifest.totals, made.manifest.options
    typer.echo(
        f"{output}: {totals.samples} entries in {counted(totals.shards, 'shard')} ({made.shards_made} made now), "
        f"{counted(made.manifest.num_skipped, 'video')} and {counted(options['frames_left_out'], 'frame')} left out"
    )
    source, pixels = options["sizes"]["source_bytes"], options["sizes"]["pixel_bytes"]
    typer.echo(
        f"{totals.bytes / 1e6:.2f} MB: {_share(totals.bytes, source)} of the videos' shards ({source / 1e6:.2f} MB), "
        f"{_share(totals.bytes, pixels)} of the pixels ({pixels / 1e6:.2f} MB)"
    )
    print_skipped(made.manifest)


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"
