"""`regen evaluate`: models compared on videos by a pinned protocol, as one page and one JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tools.generate import parse_size
from tools.shards.progress import stopping_cleanly


def evaluate(
    videos: Annotated[Path, typer.Argument(help="Folder with videos, searched with its subfolders; or one video.")],
    out: Annotated[Path, typer.Option(help="Folder of the page, the JSON and the media.")],
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="A run, an export, a diffusers autoencoder (folder), `packaged`, or a trivial decoder; several times, "
            "as PATH or NAME=PATH. The packaged embedder by default."
        ),
    ] = None,
    protocol: Annotated[
        Path | None, typer.Option(help="List of videos and sizes, such as configs/evaluate/davis_480p.yaml.")
    ] = None,
    short_side: Annotated[int | None, typer.Option(help="Resize to this shorter side.", min=8)] = None,
    crop: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH, cut from the centre after the resize.")] = None,
    frames: Annotated[int | None, typer.Option(help="At most so many frames of each video.", min=1)] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps of REGEN models.", min=1)] = None,
    segment_frames: Annotated[int | None, typer.Option(help="Frames of a segment for rFVD.", min=2)] = None,
    seed: Annotated[int | None, typer.Option(help="Of the decoders' noise.")] = None,
    clip_frames: Annotated[
        int, typer.Option(help="Frames of a clip of trivial decoders and diffusers autoencoders.", min=1)
    ] = 17,
    baselines: Annotated[bool, typer.Option(help="Also measure the trivial decoders.")] = True,
    lpips: Annotated[Path | None, typer.Option(help="LPIPS weights: TorchScript or safetensors.")] = None,
    fvd: Annotated[
        Path | None, typer.Option(help="Network of video for rFVD: TorchScript, or a transformers folder.")
    ] = None,
    fid: Annotated[
        Path | None, typer.Option(help="Network of frames for rFID: TorchScript, or a transformers folder.")
    ] = None,
    vmaf: Annotated[bool, typer.Option(help="Measure VMAF.")] = True,
) -> None:
    """Measure models on videos by a pinned protocol, and write a page that compares them. The same command again
    measures what is missing.

    Example: regen evaluate runs/videos --model packaged --frames 33 --short-side 192 --out runs/evaluation
    """
    from rich.console import Console

    from regen_dist.config.files import write_text_atomically
    from regen_dist.evaluation.evaluate import Evaluation, Networks
    from regen_dist.evaluation.evaluate_page import markdown, write_page
    from regen_dist.evaluation.evaluated_models import PACKAGED, load_models
    from regen_dist.evaluation.perceptual import load_features, load_lpips
    from regen_dist.evaluation.protocol import find_videos, load_protocol

    sides = None if crop is None else parse_size(crop, "--crop")
    changes = {"short_side": short_side, "crop": sides, "frames": frames, "steps": steps, "seed": seed}
    name = videos.resolve().name if protocol is None else None  # of what is measured, as the page's title
    pinned = load_protocol(protocol, **changes, segment_frames=segment_frames, name=name or None)
    models = load_models([PACKAGED] if model is None else model,
                         steps=pinned.steps, clip_frames=clip_frames, baselines=baselines)  # fmt: skip
    networks = Networks(
        load_lpips(lpips) if lpips else None,
        load_features(fvd, video=True) if fvd else None,
        load_features(fid, video=False) if fid else None,
    )
    log = Console(stderr=True, highlight=False, markup=False).print
    evaluation = Evaluation(out, pinned, find_videos(videos, pinned, out), networks, log, with_vmaf=vmaf)
    with stopping_cleanly():
        facts = evaluation.run(models)
    text = markdown(facts)
    write_text_atomically(out / "evaluation.md", text)
    page = write_page(out, facts)
    print(text)
    log(f"Written: {page}, {out / 'evaluation.json'}, {out / 'evaluation.md'}", soft_wrap=True)
