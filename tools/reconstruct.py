"""`regen reconstruct`: encode a video, decode it from its latents alone, and measure the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regen_dist.tables import counted
from tools.shards.progress import stopping_cleanly

if TYPE_CHECKING:
    from regen_dist.inference.codec import Codec
    from regen_dist.inference.frames import SourceVideo
    from regen_dist.tables import Table


class Weights(StrEnum):
    """Weights of a checkpoint used for decoding."""

    ema = "ema"
    plain = "plain"


def reconstruct(
    video: Annotated[Path, typer.Argument(help="Any video file: any length, size and frame rate.")],
    out: Annotated[Path, typer.Option(help="Folder for the videos, the contact sheet and metrics.json.")],
    run: Annotated[
        Path | None,
        typer.Option(
            help="Run folder with a checkpoint, such as runs/demo/embedder; or a model that was exported. "
            "The packaged embedder by default."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Sampling steps of the decoder.")] = 1,
    fps: Annotated[float | None, typer.Option(help="Output frame rate; the source's by default.")] = None,
    overlap: Annotated[int, typer.Option(help="Frames that neighbouring clips share.")] = 1,
    short_side: Annotated[int | None, typer.Option(help="Resize the source to this shorter side first.")] = None,
    max_frames: Annotated[int | None, typer.Option(help="Use only the first frames.")] = None,
    weights: Annotated[
        Weights | None,
        typer.Option(help="EMA weights (a run's default), or those of the last step; an export has one kind."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the decoder's noise.")] = 0,
    group: Annotated[int, typer.Option(help="Clips decoded together; 1 needs the least memory.")] = 4,
    tile: Annotated[
        int | None,
        typer.Option(help="Work in tiles of so many pixels a side: less memory for large frames, the same result."),
    ] = None,
    cuts: Annotated[
        bool, typer.Option("--cuts/--no-cuts", help="Begin a new clip at every cut: no clip shows two shots.")
    ] = True,
    compare: Annotated[bool, typer.Option("--compare", help="Also measure the trivial decoders.")] = False,
) -> None:
    """Encode a video clip by clip, decode it from the latents alone, and measure the result.

    Example: regen reconstruct runs/videos/bikes.mp4 --out runs/bikes --short-side 192
    """
    from rich.console import Console

    from regen_dist.evaluation.metrics import Options
    from regen_dist.evaluation.reconstruct import FILES
    from regen_dist.evaluation.reconstruct import reconstruct as job
    from regen_dist.inference.codec import PACKAGED_EMBEDDER, Codec
    from regen_dist.inference.frames import SourceVideo

    run = PACKAGED_EMBEDDER if run is None else run
    console = Console()
    options = Options(steps=steps, fps=fps, overlap=overlap, seed=seed, group=group, cuts=cuts, tile=tile)
    source = SourceVideo(video, short_side=short_side, max_frames=max_frames)
    codec = Codec.load(run, weights=None if weights is None else weights.value)
    codec.use_tiles(tile)
    if (source.height, source.width) != source.stored:
        height, width = source.stored
        console.print(
            f"The source is resized from {height}x{width} to {source.height}x{source.width} and compared at that size."
        )
    for note in source.notes:
        console.print(f"Note: {note}", highlight=False, markup=False, soft_wrap=True)
    with stopping_cleanly(continues=False), _progress(source) as progress:
        report = job(
            source,
            codec,
            out,
            options,
            label=decoder_label(codec, steps),
            model=model_facts(run, codec),
            compare=compare,
            progress=progress,
        )
    _table(report).show(console)
    for note in report["notes"]:
        console.print(f"Note: {note}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"Written to {out}: {', '.join(FILES)}", markup=False, soft_wrap=True)


def decoder_label(codec: Codec, steps: int) -> str:
    """Name of the decoder in tables and pictures."""
    if codec.kind == "magvit2":
        return "MAGVIT-v2 baseline"
    return f"REGEN, {counted(steps, 'step')}"


def model_facts(run: Path, codec: Codec) -> dict[str, Any]:
    """Return the record of the model for metrics.json."""
    hash_file, origin = run / "config.hash", codec.config.origin
    return {
        "run": run.name,
        "config_hash": origin.config_hash if origin else hash_file.read_text().strip() if hash_file.is_file() else None,
        "kind": codec.kind,
        "temporal_compression": codec.temporal_compression,
        "latent_channels": codec.latent_channels,
        "weights": codec.weights,
        "step": codec.step,
    }


@contextmanager
def _progress(source: SourceVideo) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"reconstructing {escape(source.path.name)}", total=source.num_frames)
        yield lambda frame: bar.update(task, completed=frame)


def _table(report: dict[str, Any]) -> Table:
    """Return the table of measures: one row for the codec and one for each trivial decoder."""
    from regen_dist.evaluation.reconstruction_table import measures_table

    video, options = report["video"], report["options"]
    rate = f"{video['fps']:.4g} fps" + (f" in, {options['fps']:.4g} out" if options["fps"] else "")
    return measures_table(
        [report, *report.get("trivial", {}).values()],
        title=f"{video['file']}: {counted(video['frames'], 'frame')} of {video['height']}x{video['width']}, {rate}",
        note=_caption(report),
    )


def _caption(report: dict[str, Any]) -> str:
    from regen_dist.evaluation.reconstruction_table import figure

    seams = f"seam ratio {figure(report['seam_ratio'], 3)}, the source's {figure(report['seam_ratio_source'], 3)}"
    size = f"{report['latent_bits_per_pixel']:.3f} bits of latent per pixel, 1:{report['compression']:.0f} of raw RGB"
    encode, decode = (f"{report[f'{what}_frames_per_s']:.1f} frames/s" for what in ("encode", "decode"))
    clips, cuts = counted(report["windows"], "clip"), report["video"]["cuts"]
    shots = f" in {len(cuts) + 1} shots" if cuts else ""
    return "\n".join([size, f"encodes {encode}, decodes {decode}", f"{clips}{shots}, {seams}"])
