"""The videos that are compared: the held-out ones, what an embedder makes of them, and what was generated."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from regen_dist.data.dataset.catalogue import Dataset
from regen_dist.data.dataset.index import Sample, samples_of
from regen_dist.data.making.moving_shapes import Combination, split_combinations
from regen_dist.data.making.shape_captions import parse_caption
from regen_dist.data.making.shapes import Attributes
from regen_dist.data.video.reader import VideoReader, frame_to_rgb
from regen_dist.errors import DataError
from regen_dist.models.encoder import Latents
from regen_dist.pixels import to_frames, to_video

_NUMBERED = re.compile(r"\d+(-\d+)?")  # with several samples of a prompt, each by its own number
UInt8s = npt.NDArray[np.uint8]


class ClipCodec(Protocol):
    """What is needed of a codec: `regen_dist.inference.codec.Codec`, or a stand-in of the same shape."""

    num_frames: int

    def encode(self, clips: Tensor) -> Latents:
        """Clips [B, 3, T, H, W] in [-1, 1], T of 1 or `num_frames`, to latents."""
        ...

    def decode(self, latents: Latents, times: Tensor, *, starts: list[float]) -> Tensor:
        """Clips [B, 3, T, H, W] in [-1, 1] at `times` [T], each from its first frame on."""
        ...


class ShapeClip(NamedTuple):
    """A video and what it is to show: frames uint8 RGB [T, H, W, 3], `fps` of them a second."""

    name: str
    caption: str
    wanted: Attributes
    frames: UInt8s
    fps: float


def generated_names(folder: Path, number: int) -> list[str]:
    """The first videos that `regen generate` wrote into a folder, by name. The JSON of a video comes last, so one
    without it is not finished and not counted."""
    return sorted(path.stem for path in folder.glob("*.json") if _NUMBERED.fullmatch(path.stem))[:number]


def generated_facts(folder: Path, names: Iterable[str]) -> dict[str, Any]:
    """What the JSON of all these videos agrees on: how they were made."""
    kept: dict[str, Any] | None = None
    for name in names:
        facts = _facts(folder / f"{name}.json")
        kept = facts if kept is None else {key: value for key, value in kept.items() if facts.get(key) == value}
    return {key: value for key, value in (kept or {}).items() if key != "prompt"}


def generated_prompts(folder: Path, names: Iterable[str]) -> list[str]:
    """What the videos were generated from. Raises DataError naming the JSON that does not say so."""
    prompts = []
    for name in names:
        prompt = _facts(folder / f"{name}.json").get("prompt")
        if not isinstance(prompt, str):
            raise DataError(f"{folder / name}.json says no prompt; generate the videos again with `regen generate`")
        prompts.append(prompt)
    return prompts


def generated_clips(folder: Path, names: Sequence[str]) -> Iterator[ShapeClip]:
    """Generated videos with their prompts. Raises DataError naming the file when one cannot be used."""
    for name, prompt in zip(names, generated_prompts(folder, names), strict=True):
        video = folder / f"{name}.mp4"
        if not video.is_file():
            raise DataError(f"{video} is missing, though {name}.json is there; generate the videos again")
        yield _decoded(f"{name}.mp4", prompt, video, str(video))


def held_out_samples(dataset: Dataset, number: int) -> list[Sample]:
    """The first samples of a dataset; reads all of its index."""
    samples: list[Sample] = samples_of(dataset.table().slice(0, number))
    return samples


def held_out_clips(dataset: Dataset, samples: Iterable[Sample], clip_frames: int | None) -> Iterator[ShapeClip]:
    """Videos of a dataset with their captions: so much of each as is whole clips of `clip_frames` (None: all)."""
    for sample in samples:
        if sample.caption is None:
            raise DataError(f"{sample.name} of {dataset.store.url} has no caption, so nobody knows what it shows")
        clip = _decoded(sample.key, sample.caption, dataset.read(sample), sample.name)
        yield clip._replace(frames=clip.frames[: whole_frames(len(clip.frames), clip_frames)])


def whole_frames(num_frames: int, clip_frames: int | None) -> int:
    """How many frames of a video are encoded: whole clips, or a single frame of one that is shorter."""
    return num_frames if clip_frames is None else max(1, num_frames // clip_frames * clip_frames)


def reconstructed(clip: ShapeClip, codec: ClipCodec) -> ShapeClip:
    """What a codec makes of a video, clip by clip without overlap as in a latent cache, in one step.

    Args:
        clip: a video of whole clips, or of one frame.
    """
    length = codec.num_frames if len(clip.frames) > 1 else 1
    video = to_video(list(clip.frames))  # [3, T, H, W]
    clips = video.unflatten(1, (-1, length)).movedim(1, 0)  # [n, 3, k+1, H, W]
    times, starts = torch.arange(length, dtype=torch.float64), [float(length * number) for number in range(len(clips))]
    frames = codec.decode(codec.encode(clips), times, starts=starts)  # [n, 3, k+1, H, W]
    return clip._replace(frames=to_frames(frames.movedim(0, 1).flatten(1, 2)))


def seen_in_training(wanted: Iterable[Attributes], dataset: Dataset) -> int | None:
    """How many of these show a combination of colour, shape and direction that the dataset's options do not hold out;
    None where the dataset does not tell what it holds out."""
    share = dataset.manifest.options.get("held_out_share")
    if not isinstance(share, float):
        return None
    held_out = set(split_combinations(share)[1])
    return sum(Combination(each.colour, each.shape, each.direction) not in held_out for each in wanted)


def _facts(path: Path) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: damaged ({error}); generate the video again") from error
    return facts


def _decoded(name: str, caption: str, source: Path | bytes, where: str) -> ShapeClip:
    try:
        wanted = parse_caption(caption)
        with VideoReader(source) as reader:
            frames = [frame_to_rgb(frame) for _, frame in reader.frames(range(len(reader.table.pts)))]
            return ShapeClip(name, caption, wanted, np.stack(frames), float(reader.rate))
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
