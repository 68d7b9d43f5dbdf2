"""`regen generate`: videos from prompts."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from regen_dist.distributed.environment import RankInfo, read_rank_info
from regen_dist.errors import ConfigError
from regen_dist.tables import counted
from tools.checkpoint.maintenance import progress_bar
from tools.reconstruct import Weights
from tools.shards.progress import parse_task, stopping_cleanly

if TYPE_CHECKING:
    from regen_dist.inference.generate import Prompt
    from regen_dist.inference.generation_settings import GenerationSettings
    from regen_dist.inference.given_media import GivenMedia
    from regen_dist.inference.sampler import TextToVideoModel

    AnyGivenMedia = GivenMedia | Mapping[int, GivenMedia]


class FileLayout(StrEnum):
    """Naming scheme of output files."""

    numbered = "numbered"
    vbench = "vbench"


class Sampler(StrEnum):
    """Integration method of the flow ODE."""

    euler = "euler"
    heun = "heun"
    dpmpp_2m = "dpmpp_2m"


def generate(
    run: Annotated[Path, typer.Option(help="Run of a text-to-video model, or an exported model.")],
    embedder: Annotated[Path, typer.Option(help="Run or export of the embedder of its training latents.")],
    prompt: Annotated[list[str] | None, typer.Argument(help="Prompts; several are numbered in order.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the videos, each with a JSON file beside it.")] = Path(
        "runs/generated"
    ),
    prompts: Annotated[Path | None, typer.Option(help="Text file with one prompt per line.")] = None,
    image: Annotated[
        Path | None,
        typer.Option(
            help="Picture that videos begin with, or a folder of one a prompt (00000.png, …); covers the size, cropped."
        ),
    ] = None,
    continued: Annotated[
        Path | None,
        typer.Option(
            "--continue",
            help="Video that every video continues, or a folder of one a prompt (00000.mp4, …); --frames are added.",
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Videos of each prompt: of seeds --seed, --seed + 1, ….", min=1)] = 1,
    layout: Annotated[
        FileLayout, typer.Option(help="vbench: OUT/PROMPT-0.mp4, …, and the JSON files in OUT-records.")
    ] = FileLayout.numbered,
    size: Annotated[
        str | None, typer.Option(help="HEIGHTxWIDTH in pixels; the largest of the training by default.")
    ] = None,
    frames: Annotated[int | None, typer.Option(help="Frames per video, 1: images; longest row by default.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames a second; what it was trained on by default.")] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps; the config's by default.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale, 1 for none; the config's by default.")] = None,
    sampler: Annotated[Sampler | None, typer.Option(help="Sampler; the config's by default.")] = None,
    negative: Annotated[str | None, typer.Option(help="Negative prompt of the guidance; empty by default.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of all noise.", min=0)] = 0,
    decode_steps: Annotated[int, typer.Option(help="Sampling steps of the embedder's decoder.")] = 1,
    weights: Annotated[Weights | None, typer.Option(help="EMA weights (a run's default), or the last step's.")] = None,
    untrained: Annotated[bool, typer.Option("--untrained", help="Use the initial weights of the training.")] = False,
    text: Annotated[str | None, typer.Option(help="Text encoder, if not where the caches record it.")] = None,
    batch: Annotated[int, typer.Option(help="Prompts sampled at a time.")] = 8,
    task: Annotated[str | None, typer.Option(help="Share of the prompts, I/N; or slurm, inside an array.")] = None,
) -> None:
    """Generate a video for every prompt: mp4 (PNG for one frame) and JSON with everything needed to reproduce it.

    Existing videos with the same settings and models are skipped. Ranks of one job share the prompts.

    With --image videos begin with a picture, with --continue they continue a video.

    Example: regen generate "a red circle moves left" --run runs/t2v_nano --embedder runs/nano --out runs/generated
    """
    from regen_dist.inference.generate import Layout

    if image is not None and continued is not None:
        raise ConfigError("--image sets the first frame, --continue a video to continue; give only one of them")
    names = Layout(samples, layout is FileLayout.vbench)
    for given in (*(prompt or []), negative or ""):
        check_text(given)
    wanted = names.expanded(_prompts(prompt or [], prompts))
    place = read_rank_info(os.environ) if task is None else RankInfo()  # --task alone says which part is this one's
    number, count = place[:2] if task is None else parse_task(task)
    share = wanted[number::count]
    if count > 1:
        who = f"task {task}" if task else f"rank {number} of {count}, as the environment says"
        what = "prompts" if samples == 1 else "videos"
        typer.echo(f"{who}: {len(share)} of {len(wanted)} {what}")
    sides = None if size is None else parse_size(size)
    from regen_dist.distributed.ranks import Ranks
    from regen_dist.inference.codec import Codec
    from regen_dist.inference.generate import generate as job
    from regen_dist.inference.generate import load_text_encoder
    from regen_dist.inference.generation_settings import resolve_settings
    from regen_dist.inference.sampler import TextToVideoModel

    device = Ranks(*place).device
    model = TextToVideoModel.load(run, None if weights is None else weights.value, device, untrained=untrained)
    media, left = _media(model, image, continued, sides)
    settings = resolve_settings(
        model, size=sides, frames=left if frames is None else frames, fps=fps, steps=steps, guidance=guidance,
        sampler=None if sampler is None else sampler.value, decode_steps=decode_steps, seed=seed, negative=negative,
    )  # fmt: skip
    if number == 0:
        _describe(model, settings, len(wanted), sized=size is not None)
        _note(model, settings, media)
    with stopping_cleanly(), progress_bar() as progress:
        codec = Codec.load(embedder, device=device)
        paths = {"run": str(run), "embedder": str(embedder), "text_encoder": text}
        paths |= {name: str(path) for name, path in (("image", image), ("continue", continued)) if path is not None}
        found = job(
            model, codec, lambda: load_text_encoder(model.space, text, device), share, out, settings, batch=batch,
            paths=paths, layout=names, given=media, progress=progress,
        )  # fmt: skip
    for cut in found.cut:
        typer.echo(f"warning: a prompt has more tokens than the text encoder takes and was cut: {cut[:80]}…", err=True)
    there = f"; {len(found.skipped)} were there" if found.skipped else ""
    typer.echo(f"{out}: {len(found.made)} generated{there}")


def parse_size(text: str, option: str = "--size") -> tuple[int, int]:
    """Parse "192x320" to (height, width); ConfigError if it is malformed."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not match:
        raise ConfigError(f"{option} {text}: write HEIGHTxWIDTH in pixels, such as 192x320")
    return int(match[1]), int(match[2])


def check_text(text: str) -> None:
    """Raise ConfigError for an argument of the command line whose bytes are not UTF-8: no text encoder takes it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{text[:80]!r} is not UTF-8; set the terminal to UTF-8, or write it to a file") from None


def _prompts(given: Sequence[str], file: Path | None) -> list[Prompt]:
    from regen_dist.inference.generate import Prompt, read_prompts

    if bool(given) == (file is not None):
        raise ConfigError("give prompts on the command line, or a file of them with --prompts; one of both")
    return read_prompts(file) if file else [Prompt(number, text) for number, text in enumerate(given)]


def _media(
    model: TextToVideoModel, image: Path | None, continued: Path | None, sides: tuple[int, int] | None
) -> tuple[AnyGivenMedia | None, int | None]:
    """Return the given media, and the number of frames per row that the model has room for beside given clips (None: no
    limit)."""
    from regen_dist.inference.generation_settings import longest_row, resolve_settings, size_for
    from regen_dist.inference.given_media import clips_given, read_image, read_images, read_video, read_videos

    resolve_settings(model, size=sides)  # rejects an impossible size
    size, space = sides or size_for(model.space), model.space
    if image is not None:
        return read_images(image, size) if image.is_dir() else read_image(image, size), None
    if continued is None:
        return None, None
    longest = longest_row(model)
    read = read_videos if continued.is_dir() else read_video
    media = read(continued, size, most_clips=max(1, longest - 1), length=space.num_frames, fps=space.fps)
    return media, max(1, longest - clips_given(media)) * space.num_frames


def _note(model: TextToVideoModel, settings: GenerationSettings, media: AnyGivenMedia | None) -> None:
    """Print notes on settings that the model was not trained for."""
    from regen_dist.inference.generation_settings import clips_of, longest_row
    from regen_dist.inference.given_media import clips_given, notes

    flow, given = model.config.diffusion, clips_given(media)
    clips = 0 if settings.is_image else clips_of(settings, model.space, given)
    found = notes(media, flow.given_content, flow.given_clips, clips, longest_row(model))
    if settings.negative is not None and settings.guidance == 1:
        found.append("guidance 1 is none, so that the negative prompt changes nothing; give another --guidance")
    for note in found:
        typer.echo(f"Note: {note}", err=True)


def _describe(model: TextToVideoModel, settings: GenerationSettings, count: int, *, sized: bool) -> None:
    from regen_dist.inference.generation_settings import trained_sizes

    if not sized and (sizes := len(trained_sizes(model.space))) != 1:
        found = f"have {sizes} sizes, this is the largest" if sizes else "record no size, this is the paper's"
        typer.echo(f"Note: the caches {found}; --size gives another", err=True)
    facts, prompts = model.facts(), counted(count, "prompt")
    typer.echo(
        f"{facts['run']}, {facts['weights']} weights of step {facts.get('step', 'unknown')}: {prompts}, "
        f"{settings.frames} frames of {settings.height}x{settings.width} at {settings.fps:g} fps, {settings.steps} "
        f"steps of {settings.sampler}, guidance {settings.guidance:g}"
    )
