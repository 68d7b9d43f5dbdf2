"""Generation of videos from prompts: text, noise, latents, frames, files.

A prompt's noise depends only on the seed and the prompt's number, so neither its batch nor the task that generates it
changes more than the last bits of its latents.

Legend: B prompts, n clips in a row, C channels, F latent frames, h x w latent cells.
"""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from regen_dist.config.files import write_bytes_atomically, write_text_atomically
from regen_dist.config.t2v import TextConfig
from regen_dist.config.version import code_version
from regen_dist.data.pool import Progress
from regen_dist.diffusion.noise import latent_gaussian
from regen_dist.diffusion.samplers import GivenFrames
from regen_dist.errors import CheckpointError, ConfigError, DataError
from regen_dist.inference.codec import Codec
from regen_dist.inference.encoder import check_embedder
from regen_dist.inference.frames import Frame, write_video
from regen_dist.inference.generation_settings import GenerationSettings, clips_of, frame_positions
from regen_dist.inference.given_media import GivenImage, GivenMedia, clips_given, given_row
from regen_dist.inference.latent_space import LatentSpace
from regen_dist.inference.long_video import row_frames
from regen_dist.inference.sampler import Text, TextToVideoModel
from regen_dist.jsontext import json_text
from regen_dist.models.encoder import Latents
from regen_dist.models.t2v import FRAMES_PER_CLIP
from regen_dist.models.text import TextEncoder
from regen_dist.observe.hardware import describe_machine
from regen_dist.pixels import to_frames

# Prompts: read from a file, and embedded as the captions of the caches were.
#
# Legend: L tokens of one prompt, D their width.


class Prompt(NamedTuple):
    """A prompt and its number, which is its place in the file. The number and seed + `sample` key its noise."""

    number: int
    text: str
    sample: int = 0  # index among several videos of one prompt, from 0


MediaLookup = Callable[[Prompt], GivenMedia | None]


class CaptionEncoder(Protocol):
    """Interface of a text encoder: `regen_dist.models.text.TextEncoder`, or any object with the same methods."""

    @property
    def fingerprint(self) -> str:
        """Digest of everything that decides the embeddings."""

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """Embed a caption as [L, D]."""

    def cuts(self, caption: str) -> bool:
        """Return whether a caption is too long and is cut."""


class Embedded(NamedTuple):
    """Embeddings [L, D] of prompts and of the negative prompt, float32 on the CPU; and the prompts that were cut."""

    texts: list[Tensor]
    null: Tensor
    cut: list[str]


def read_prompts(path: Path) -> list[Prompt]:
    """Read the prompts of a text file, one a line; empty lines have no number.

    Raises:
        DataError: the file is missing, is not text, or is empty.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read prompts from {path}: {error}; give a UTF-8 text file") from error
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise DataError(f"{path} holds no prompt; write one a line")
    return [Prompt(number, text) for number, text in enumerate(texts)]


def load_text_encoder(space: LatentSpace, path: str | None, device: torch.device) -> TextEncoder:
    """Load the text encoder that the caches were made with; `path` gives its location if it was moved.

    Raises:
        CheckpointError: the encoder is not there, or the caches do not record which one it was.
        BackendError: a package that the encoder needs is not installed.
    """
    facts = space.facts["text"] or {}
    name = path or facts.get("encoder")
    if name is None:
        raise CheckpointError("the caches do not say which text encoder they were made with; give it with --text")
    longest = TextConfig(max_tokens=int(facts.get("max_tokens", TextConfig().max_tokens))).max_tokens
    return TextEncoder.load(TextConfig(encoder=str(name), max_tokens=longest), device)


def embed_prompts(
    encoder: CaptionEncoder, space: LatentSpace, prompts: Sequence[Prompt], negative: str | None = None
) -> Embedded:
    """Embed prompts, rounded as in a cache.

    Args:
        encoder: the text encoder; must be the one that the caches were made with.
        space: latent space of the caches.
        prompts: prompts to embed; prompts that are too long are cut.
        negative: negative prompt that guidance leads away from; None takes the caches' empty caption.

    Raises:
        CheckpointError: the encoder differs from that of the caches.
    """
    check_text_encoder(encoder, space)
    asked = dict.fromkeys([*(prompt.text for prompt in prompts), *([] if negative is None else [negative])])
    # One by one: those of a long list do not fit on a GPU together. The samples of a prompt share one.
    found = {text: as_in_cache(encoder.encode([text])[0]) for text in asked}
    null = space.null_text.text if negative is None else found[negative]
    return Embedded([found[prompt.text] for prompt in prompts], null, [text for text in asked if encoder.cuts(text)])


def check_text_encoder(encoder: CaptionEncoder, space: LatentSpace) -> None:
    """Raise CheckpointError when an encoder is not the one that the caches were made with."""
    wanted = (space.facts["text"] or {}).get("fingerprint")
    if encoder.fingerprint != wanted:
        raise CheckpointError(
            f"the text encoder is not the one that the caches were made with (fingerprint {encoder.fingerprint[:16]}…, "
            f"theirs is {str(wanted)[:16]}…); give that one with --text"
        )


def as_in_cache(text: Tensor) -> Tensor:
    """Round an embedding as a cache stores it."""
    return text.to("cpu", torch.bfloat16).float()


# The files of a generation: for each prompt a video (or image) and a JSON file with everything that makes it again.
#
# OUT/00000.mp4     video of prompt 0; OUT/00000.png where images are made
# OUT/00000.json    written last: prompt 0 is done while this matches the request
#
# Several samples of a prompt: OUT/00000-0.mp4, OUT/00000-1.mp4, … Named by prompt (as VBench reads them):
# OUT/a red circle-0.mp4, and nothing else in OUT; their JSON files lie in OUT-records.

RECORD_FORMAT = 1
_VIDEO, _IMAGE, _RECORD = ".mp4", ".png", ".json"
_LONGEST_NAME = 255  # bytes, on most file systems
_ABOUT = ("paths", "version", "machine")  # facts in a record that do not decide the video


@dataclass(frozen=True)
class Layout:
    """Naming of the files of a generation.

    Args:
        samples: number of samples of each prompt.
        by_prompt: name videos by prompt and sample, and keep their records in a folder next to them, since VBench takes
            every file in a folder for a video.
    """

    samples: int = 1
    by_prompt: bool = False

    def stem(self, prompt: Prompt) -> str:
        """File name of a prompt's sample, without the ending."""
        name = prompt.text if self.by_prompt else f"{prompt.number:05d}"
        return f"{name}-{prompt.sample}" if self.by_prompt or self.samples > 1 else name

    def records(self, folder: Path) -> Path:
        whole = Path(os.path.abspath(folder))  # "." has no name
        return whole.with_name(f"{whole.name}-records") if self.by_prompt else folder

    def expanded(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """List every sample of every prompt.

        Raises:
            ConfigError: a prompt cannot be a file name, or two prompts are the same.
        """
        if self.samples < 1:
            raise ConfigError(f"{self.samples} samples of each prompt; give at least 1")
        found = [prompt._replace(sample=sample) for prompt in prompts for sample in range(self.samples)]
        if self.by_prompt:
            counts = Counter(map(self.stem, found))
            bad = [repr(each[:80]) for each in counts if counts[each] > 1 or not _is_file_name(each)]
            if bad:
                raise ConfigError(
                    f"no files can be called by these prompts: {', '.join(bad[:5])}; they must differ, have "
                    f"{_LONGEST_NAME} bytes at most, no / and no leading dot. Or leave --layout out: files are "
                    "numbered then"
                )
        return found


def _is_file_name(stem: str) -> bool:
    fits = len(stem.encode()) + len(_RECORD) <= _LONGEST_NAME  # the longest ending
    return fits and not stem.startswith(".") and not any(each in "/\0" for each in stem)


class GeneratedFiles:
    """Files of a generation in one folder.

    Args:
        folder: output folder.
        settings: settings of the generation.
        provenance: everything else that decides the videos: model, embedder, text encoder.
        paths: locations of those models; recorded, but not compared.
        layout: naming of the files.
        given: the image or video that a prompt's video begins with or continues, for its record.
    """

    def __init__(
        self,
        folder: Path,
        settings: GenerationSettings,
        provenance: dict[str, Any],
        paths: dict[str, str | None],
        layout: Layout = Layout(),
        given: MediaLookup = lambda prompt: None,
    ) -> None:
        self.folder, self._settings, self._layout, self._given = folder, settings, layout, given
        self._provenance, self._paths = provenance, paths

    def make_folders(self) -> None:
        """Create the folders of videos and records; OSError, with its path, where that is impossible."""
        for folder in (self.folder, self._layout.records(self.folder)):
            folder.mkdir(parents=True, exist_ok=True)

    def check_kept(self, prompt: Prompt, given: Path) -> None:
        """Raise ConfigError where writing a prompt's video or image would replace or remove a given file."""
        if given.resolve() in (self._path(prompt, suffix).resolve() for suffix in (_VIDEO, _IMAGE)):
            raise ConfigError(
                f"{given} would be replaced by what is generated from it, for prompt {prompt.number}; choose another "
                "--out"
            )

    def is_done(self, prompt: Prompt) -> bool:
        """Return whether the prompt was already generated with the same settings and models."""
        try:
            found = json.loads(self._path(prompt, _RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # missing or damaged: generate it again
            return False
        if not isinstance(found, dict) or not self._media_path(prompt).is_file():
            return False
        return {name: value for name, value in found.items() if name not in _ABOUT} == self._decided(prompt)

    def write(self, prompt: Prompt, frames: Iterable[list[Frame]]) -> Path:
        """Write a prompt's video or image as its frames arrive, then its record. Returns the video's path.

        Raises:
            DataError: a file cannot be written.
        """
        record, path = self._path(prompt, _RECORD), self._media_path(prompt)
        record.unlink(missing_ok=True)  # first, so that it never describes another video
        if self._settings.is_image:
            _write_image(path, frames)
        else:
            write_video(path, chain.from_iterable(frames), self._settings.fps)
        self._path(prompt, _VIDEO if self._settings.is_image else _IMAGE).unlink(missing_ok=True)
        about = {"paths": self._paths, "version": code_version(), "machine": describe_machine()}
        write_text_atomically(record, json_text(self._decided(prompt) | about, indent=1, ensure_ascii=False) + "\n")
        return path

    def _decided(self, prompt: Prompt) -> dict[str, Any]:
        """Everything that decides the video, in the form in which it is read back from JSON."""
        given = self._given(prompt)
        facts = {
            "format": RECORD_FORMAT,
            "prompt": prompt.text,
            "number": prompt.number,
            "file": self._media_path(prompt).name,
            "settings": asdict(self._settings),
            **({"sample": prompt.sample, "seed": self._settings.seed + prompt.sample} if prompt.sample else {}),
            **({} if given is None else {"given": given.facts()}),
            **self._provenance,
        }
        read_back: dict[str, Any] = json.loads(json_text(facts))
        return read_back

    def _media_path(self, prompt: Prompt) -> Path:
        return self._path(prompt, _IMAGE if self._settings.is_image else _VIDEO)

    def _path(self, prompt: Prompt, suffix: str) -> Path:
        folder = self._layout.records(self.folder) if suffix == _RECORD else self.folder
        return folder / f"{self._layout.stem(prompt)}{suffix}"


def _write_image(path: Path, frames: Iterable[list[Frame]]) -> None:
    from PIL import Image

    ((frame,),) = frames
    data = io.BytesIO()
    Image.fromarray(frame).save(data, "PNG")
    write_bytes_atomically(path, data.getvalue())


class Generated(NamedTuple):
    """Prompts that were generated, prompts that existed already, and the texts that were too long and cut."""

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
    layout: Layout = Layout(),
    given: GivenMedia | Mapping[int, GivenMedia] | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Generated:
    """Generate a video for every prompt that has none yet.

    Args:
        model: text-to-video model, which samples latents.
        codec: decoder of the latents; must be the embedder whose latents the model was trained on.
        load_encoder: returns the text encoder of the caches; called only when a prompt has no video yet.
        prompts: prompts to generate.
        out: folder for the videos and their JSON files (see `GeneratedFiles`).
        settings: settings of the videos.
        batch: number of prompts sampled at once; affects the speed, and the last bits of the result.
        paths: locations of the models, for the records.
        layout: naming of the files; `Layout.expanded` lists the samples of prompts.
        given: an image that every video begins with, or a video that each continues; or either by prompt number.
        progress: called with the number of prompts that are done.

    Raises:
        CheckpointError: the embedder or the text encoder differs from that of the caches.
        ConfigError: the batch size is below 1, the embedder cannot decode the settings, or a given file would be
            replaced.
        DataError: a file cannot be written.
    """
    if batch < 1:
        raise ConfigError(f"--batch {batch}: it must be at least 1")
    check_embedder(codec, model.space.facts["encoder"], "the embedder")
    if given is not None and settings.is_image:
        raise ConfigError("one frame is asked for, and an image or a video is given to go on from; ask for more frames")
    media_of = _media_lookup(given, prompts)
    provenance = _provenance(model, codec, settings, clips_given(given))
    files = GeneratedFiles(out, settings, provenance, paths or {}, layout, media_of)
    for prompt in prompts:
        if (media := media_of(prompt)) is not None:
            files.check_kept(prompt, media.path)
    skipped = [prompt for prompt in prompts if files.is_done(prompt)]
    done = set(skipped)
    wanted = [prompt for prompt in prompts if prompt not in done]
    if not wanted:
        return Generated([], skipped, [])
    files.make_folders()  # now: what refuses is told before anything is computed
    embedded = embed_prompts(load_encoder(), model.space, wanted, settings.negative)
    progress("generated", 0, len(wanted))
    for count, (prompt, frames) in enumerate(_generated(model, codec, wanted, embedded, settings, batch, media_of), 1):
        files.write(prompt, frames)
        progress("generated", count, len(wanted))
    return Generated(wanted, skipped, embedded.cut)


def _media_lookup(given: GivenMedia | Mapping[int, GivenMedia] | None, prompts: Sequence[Prompt]) -> MediaLookup:
    """Image or video given to each prompt; ConfigError where a prompt has none."""
    if not isinstance(given, Mapping):
        return lambda prompt: given
    missing = sorted({prompt.number for prompt in prompts} - given.keys())
    if missing:
        images = all(isinstance(each, GivenImage) for each in given.values())
        kind, suffix = ("image", ".png") if images else ("video", ".mp4")
        raise ConfigError(
            f"there is no {kind} for {len(missing)} of the prompts, the first is number {missing[0]}: name it "
            f"{missing[0]:05d}{suffix}"
        )
    return lambda prompt: given[prompt.number]


def sample_rows(
    model: TextToVideoModel, prompts: Sequence[Prompt], texts: Sequence[Tensor], null: Tensor,
    settings: GenerationSettings, given: GivenFrames | None = None, clips_before: int = 0,
) -> list[Latents]:  # fmt: skip
    """Sample the latents of each clip in the rows of prompts, [B, C, h, w] each, as a codec takes them.

    Args:
        model: text-to-video model, which samples latents.
        prompts: prompts, whose numbers and samples key the noise.
        texts: embeddings of the prompts, [L, D].
        null: embedding that guidance leads away from, [L, D].
        settings: settings of the videos.
        given: known latent frames of the rows.
        clips_before: clips at the beginning of the rows that the videos continue.
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
    batch: int, media_of: MediaLookup,
) -> Iterator[tuple[Prompt, Iterable[list[Frame]]]]:  # fmt: skip
    """Yield each prompt with its frames as they are decoded."""
    before = max((media.clips for media in map(media_of, prompts) if media is not None), default=0)
    clips, scale = clips_of(settings, model.space, before), model.space.scale
    encode = lru_cache(batch)(given_row)  # one image may be given to all, or to the samples of one prompt
    for first in range(0, len(prompts), batch):
        part, texts = prompts[first : first + batch], embedded.texts[first : first + batch]
        media = [media_of(prompt) for prompt in part]
        known = [encode(each, codec, scale, clips) for each in media if each is not None]
        given = GivenFrames.joined(known) if known else None
        rows = sample_rows(model, part, texts, embedded.null, settings, given, before)
        for place, prompt in enumerate(part):
            own = [Latents(*(each[place : place + 1] for each in latents)) for latents in rows]
            made = _frames(codec, own, prompt, settings, model.space, before)
            start = media[place]
            yield prompt, made if start is None else chain(start.before(settings.fps), made)


def _frames(
    codec: Codec, row: Sequence[Latents], prompt: Prompt, settings: GenerationSettings, space: LatentSpace, before: int
) -> Iterable[list[Frame]]:
    seed = settings.seed + prompt.sample
    if settings.is_image:
        image = codec.decode(row[0], torch.zeros(1), steps=settings.decode_steps, seed=seed, sample_ids=[prompt.number])
        return [list(to_frames(image[0]))]
    positions = frame_positions(settings, space.fps, before * space.num_frames)
    return row_frames(codec, row, positions, steps=settings.decode_steps, seed=seed, sample_id=prompt.number)


def _provenance(model: TextToVideoModel, codec: Codec, settings: GenerationSettings, before: int) -> dict[str, Any]:
    """Everything that decides the videos apart from the settings and the prompt."""
    space, text = model.space, model.space.facts["text"] or {}
    clips = clips_of(settings, space, before)
    origin = codec.config.origin
    return {
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
