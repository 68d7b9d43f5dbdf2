"""`regen generate`: videos from prompts."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from regen_dist.distributed.environment import Place, read_place
from regen_dist.errors import ConfigError
from tools.checkpoint.place import progress_bar
from tools.reconstruct import Weights
from tools.shards.stopping import stopping_cleanly
from tools.shards.task import parse_task

if TYPE_CHECKING:
    from regen_dist.inference.generate import Generated
    from regen_dist.inference.generation_settings import GenerationSettings
    from regen_dist.inference.prompts import Prompt
    from regen_dist.inference.text_to_video import TextToVideoModel


class Sampler(StrEnum):
    """How the flow is integrated."""

    euler = "euler"
    heun = "heun"
    dpmpp_2m = "dpmpp_2m"


def generate(
    run: Annotated[Path, typer.Option(help="Run of a text-to-video model, or a model that was exported.")],
    embedder: Annotated[Path, typer.Option(help="Run or export of the embedder that it was trained on.")],
    prompt: Annotated[list[str] | None, typer.Argument(help="What to generate; several are numbered in turn.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the videos, each with a JSON file beside it.")] = Path(
        "runs/generated"
    ),
    prompts: Annotated[Path | None, typer.Option(help="Text file with one prompt a line.")] = None,
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH in pixels; what it was trained on, if known.")] = None,
    frames: Annotated[int | None, typer.Option(help="Of each video, 1 for images; its longest row by default.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames a second; what it was trained on by default.")] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps; the config's by default.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Scale of guidance, 1 for none; the config's default.")] = None,
    sampler: Annotated[Sampler | None, typer.Option(help="The config's by default.")] = None,
    negative: Annotated[str | None, typer.Option(help="What guidance leads away from; nothing by default.")] = None,
    seed: Annotated[int, typer.Option(help="Of all noise.", min=0)] = 0,
    decode_steps: Annotated[int, typer.Option(help="Sampling steps of the embedder's decoder.")] = 1,
    weights: Annotated[Weights | None, typer.Option(help="EMA weights (a run's default), or the last step's.")] = None,
    untrained: Annotated[bool, typer.Option("--untrained", help="The weights that training began with.")] = False,
    text: Annotated[str | None, typer.Option(help="Text encoder, where it is not where the caches say.")] = None,
    batch: Annotated[int, typer.Option(help="Prompts that are sampled at once.")] = 8,
    task: Annotated[
        str | None, typer.Option(help="I/N: only this one's share of the prompts; or slurm, in an array.")
    ] = None,
) -> None:
    """Generate a video for every prompt: mp4 (PNG for one frame) and JSON with all that makes it again.

    A video that is there, made by the same settings and models, is not made again. Ranks of one job share the prompts.

    Example: regen generate "a red circle moves left" --run runs/t2v_nano --embedder runs/nano --out runs/generated
    """
    wanted = _prompts(prompt or [], prompts)
    place = read_place(os.environ) if task is None else Place()  # --task alone says which part is this one's
    number, count = parse_task(task) if task else place[:2]
    share = wanted[number::count]
    if count > 1:
        who = f"task {task}" if task else f"rank {number} of {count}, as the environment says"
        typer.echo(f"{who}: {len(share)} of {len(wanted)} prompts")
    sides = None if size is None else parse_size(size)
    from regen_dist.distributed.ranks import Ranks
    from regen_dist.inference.codec import Codec
    from regen_dist.inference.generate import generate as job
    from regen_dist.inference.generation_settings import settings_for
    from regen_dist.inference.prompts import load_text_encoder
    from regen_dist.inference.text_to_video import TextToVideoModel

    device = Ranks(*place).device
    model = TextToVideoModel.load(run, None if weights is None else weights.value, device, untrained=untrained)
    settings = settings_for(
        model, size=sides, frames=frames, fps=fps, steps=steps, guidance=guidance,
        sampler=None if sampler is None else sampler.value, decode_steps=decode_steps, seed=seed, negative=negative,
    )  # fmt: skip
    if number == 0:
        _describe(model, settings, len(wanted), sized=size is not None)
    with stopping_cleanly(), progress_bar() as progress:
        codec = Codec.load(embedder, device=device)
        paths = {"run": str(run), "embedder": str(embedder), "text_encoder": text}
        found = job(
            model, codec, lambda: load_text_encoder(model.space, text, device), share, out, settings, batch=batch,
            paths=paths, progress=progress,
        )  # fmt: skip
    _conclude(found, out)


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) of "192x320"; ConfigError when it is something else."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match:
        raise ConfigError(f"--size {text}: write HEIGHTxWIDTH in pixels, as 192x320")
    return int(match[1]), int(match[2])


def _prompts(given: Sequence[str], file: Path | None) -> list[Prompt]:
    from regen_dist.inference.prompts import Prompt, read_prompts

    if bool(given) == (file is not None):
        raise ConfigError("give prompts on the command line, or a file of them with --prompts; one of both")
    return read_prompts(file) if file else [Prompt(number, text) for number, text in enumerate(given)]


def _describe(model: TextToVideoModel, settings: GenerationSettings, count: int, *, sized: bool) -> None:
    from regen_dist.inference.generation_settings import trained_size

    if not sized and trained_size(model.space) is None:
        typer.echo("Note: the caches are not of one size; --size gives another", err=True)
    facts = model.facts()
    typer.echo(
        f"{facts['run']}, {facts['weights']} weights of step {facts.get('step', 'unknown')}: {count} prompts, "
        f"{settings.frames} frames of {settings.height}x{settings.width} at {settings.fps:g} fps, {settings.steps} "
        f"steps of {settings.sampler}, guidance {settings.guidance:g}"
    )


def _conclude(found: Generated, out: Path) -> None:
    for cut in found.cut:
        typer.echo(f"warning: a prompt has more tokens than the text encoder takes and was cut: {cut[:80]}…", err=True)
    there = f"; {len(found.skipped)} were there" if found.skipped else ""
    typer.echo(f"{out}: {len(found.made)} generated{there}")
