"""From prompts to videos: text, noise, latents, frames, files.

The noise of a prompt is a function of the seed and of the prompt's number alone, so that neither the batch that it is
in nor the task that makes it changes more than the last bits of its latents.

Legend: B prompts, n clips in a row, C channels, F latent frames, h x w latent cells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regen_dist.diffusion.given import Given
from regen_dist.diffusion.noise import latent_gaussian
from regen_dist.errors import ConfigError
from regen_dist.inference.codec import Codec
from regen_dist.inference.encoder import check_embedder
from regen_dist.inference.frames import Frame
from regen_dist.inference.generated_files import GeneratedFiles, Layout
from regen_dist.inference.generation_settings import GenerationSettings, clips_of, frame_positions
from regen_dist.inference.given_media import GivenMedia, given_row
from regen_dist.inference.latent_sampling import Text
from regen_dist.inference.prompts import CaptionEncoder, Embedded, Prompt, embed_prompts
from regen_dist.inference.rows import row_frames
from regen_dist.inference.space_files import LatentSpace
from regen_dist.inference.text_to_video import TextToVideoModel
from regen_dist.models import Latents
from regen_dist.models.t2v import FRAMES_PER_CLIP
from regen_dist.pixels import to_frames

Progress = Callable[[str, int, int], None]  # what is done, how much of it, of how much


class Generated(NamedTuple):
    """The prompts that were generated, those that were there already, and the texts that were too long and cut."""

    made: list[Prompt]
    skipped: list[Prompt]
    cut: list[str]


def generate(
    model: TextToVideoModel,
    codec: Codec,
    load_encoder: Callable[[], CaptionEncoder],
    prompts: Sequence[Prompt],
    out: Path,
    settings: GenerationSettings,
    *,
    batch: int = 8,
    paths: dict[str, str | None] | None = None,
    layout: Layout = Layout(),  # noqa: B008 - frozen
    given: GivenMedia | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Generated:
    """Generate a video for every prompt, unless it is there already.

    Args:
        model: from text to latents.
        codec: decodes them; must be the embedder whose latents the model was trained on.
        load_encoder: gives the text encoder of the caches; called when something is to do.
        prompts: what to generate.
        out: folder for the videos and their JSON files (see `GeneratedFiles`).
        settings: of the videos.
        batch: prompts that are sampled at once; changes the speed, and the last bits of the result.
        paths: where models were taken from, for the records.
        layout: how files are named; `Layout.expanded` gives the samples of prompts.
        given: an image that every video begins with, or a video that each continues.
        progress: told how many prompts are done.

    Raises:
        CheckpointError: the embedder or the text encoder is another than that of the caches.
        ConfigError: a batch of nothing; or what the embedder cannot decode.
        DataError: a file cannot be written.
    """
    if batch < 1:
        raise ConfigError(f"the batch is {batch}; it must be at least 1")
    check_embedder(codec, model.space.facts["encoder"], "the embedder")
    if given is not None and settings.is_image:
        raise ConfigError("one frame is asked for, and an image or a video is given to go on from; ask for more frames")
    files = GeneratedFiles(out, settings, _made_by(model, codec, settings, given), paths or {}, layout)
    skipped = [prompt for prompt in prompts if files.is_done(prompt)]
    done = set(skipped)
    wanted = [prompt for prompt in prompts if prompt not in done]
    if not wanted:
        return Generated([], skipped, [])
    embedded = embed_prompts(load_encoder(), model.space, wanted, settings.negative)
    progress("generated", 0, len(wanted))
    for count, (prompt, frames) in enumerate(_generated(model, codec, wanted, embedded, settings, batch, given), 1):
        files.write(prompt, frames)
        progress("generated", count, len(wanted))
    return Generated(wanted, skipped, embedded.cut)


def sample_rows(
    model: TextToVideoModel, prompts: Sequence[Prompt], texts: Sequence[Tensor], null: Tensor,
    settings: GenerationSettings, given: Given | None = None, clips_before: int = 0,
) -> list[Latents]:  # fmt: skip
    """The latents of each clip of the rows of some prompts, [B, C, h, w] each, as a codec takes them.

    Args:
        model: from text to latents.
        prompts: whose numbers and samples key their noise.
        texts: their embeddings [L, D].
        null: what guidance leads away from, [L, D].
        settings: of the videos.
        given: frames of the rows that are known.
        clips_before: clips at the rows' beginning that the videos continue.
    """
    space, device = model.space, model.device
    clips = clips_of(settings, space, clips_before)
    frames = 1 if settings.is_image else FRAMES_PER_CLIP * clips
    noises = []
    for prompt in prompts:
        number, seed = torch.tensor([prompt.number], device=device), settings.seed + prompt.sample
        noises.append(latent_gaussian(seed, number, frames, model.channels, settings.cells))
    away = Text.of([null], device).expanded(len(prompts))
    made = model.sample(
        torch.cat(noises), Text.of(texts, device), away,
        steps=settings.steps, guidance=settings.guidance, sampler=settings.sampler,
        given=given,
    )  # fmt: skip
    return space.scale.restore(made)


def _generated(
    model: TextToVideoModel, codec: Codec, prompts: Sequence[Prompt], embedded: Embedded, settings: GenerationSettings,
    batch: int, media: GivenMedia | None,
) -> Iterator[tuple[Prompt, Iterable[list[Frame]]]]:  # fmt: skip
    """Each prompt with its frames as they are decoded."""
    before = 0 if media is None else media.clips
    clips, given = clips_of(settings, model.space, before), None
    known = None if media is None else given_row(media, codec, model.space.scale, clips)
    for first in range(0, len(prompts), batch):
        part, texts = prompts[first : first + batch], embedded.texts[first : first + batch]
        given = None if known is None else known.expanded(len(part))
        rows = sample_rows(model, part, texts, embedded.null, settings, given, before)
        for place, prompt in enumerate(part):
            own = [Latents(*(each[place : place + 1] for each in latents)) for latents in rows]
            made = _frames(codec, own, prompt, settings, model.space, before)
            yield prompt, made if media is None else chain(media.before(settings.fps), made)


def _frames(
    codec: Codec, row: Sequence[Latents], prompt: Prompt, settings: GenerationSettings, space: LatentSpace, before: int
) -> Iterable[list[Frame]]:
    seed = settings.seed + prompt.sample
    if settings.is_image:
        image = codec.decode(row[0], torch.zeros(1), steps=settings.decode_steps, seed=seed, sample_ids=[prompt.number])
        return [list(to_frames(image[0]))]
    positions = frame_positions(settings, space.fps, before * space.num_frames)
    return row_frames(codec, row, positions, steps=settings.decode_steps, seed=seed, sample_id=prompt.number)


def _made_by(
    model: TextToVideoModel, codec: Codec, settings: GenerationSettings, given: GivenMedia | None
) -> dict[str, Any]:
    """What decides the videos beside the settings and the prompt."""
    space, text = model.space, model.space.facts["text"] or {}
    clips = clips_of(settings, space, 0 if given is None else given.clips)
    origin = codec.config.origin
    return {
        **({} if given is None else {"given": given.facts()}),
        "clips": clips,
        "space": {name: space.facts[name] for name in ("fingerprint", "num_frames", "channels", "fps")},
        "model": model.facts(),
        "embedder": {
            "fingerprint": space.facts["encoder"].get("fingerprint"),
            "run": origin.run if origin else space.facts["encoder"].get("run"),
            "step": codec.step,
            "weights": codec.weights,
        },
        "text_encoder": {name: text.get(name) for name in ("fingerprint", "width", "max_tokens")},
    }
