"""Small captioned videos of chosen lengths and sizes, their encoders, and captions of moving shapes."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regen_dist.config.preencode import PreencodeConfig
from regen_dist.data.format.index import SampleFacts
from regen_dist.data.format.manifest import write_manifest
from regen_dist.data.format.writing import NewSample, ShardLimits, ShardWriter, index_name
from regen_dist.data.storage.store import Store
from regen_dist.data.synthetic.shapes import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    SHAPES,
    SIZES,
    SPEEDS,
    WORDINGS,
    Attributes,
    caption,
)
from tests.helpers.video import moving_square, write_video

FPS = 8


class Video(NamedTuple):
    """One video of a dataset; `damaged` ones hold no video at all, `said` is what the index says of the frames."""

    frames: int
    height: int = 32
    width: int = 32
    caption: str | None = None
    damaged: bool = False
    said: int | None = None
    fps: float = FPS


class StandInText:
    """A text encoder of width 4 without a model: the numbers of an embedding follow from the caption's words."""

    width = 4

    def __init__(self, fingerprint: str = "stand-in") -> None:
        self.fingerprint, self.asked = fingerprint, list[str]()

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        self.asked += captions
        return [torch.stack([_word(word) for word in [*caption.split(), ""]]) for caption in captions]

    def cuts(self, caption: str) -> bool:
        """None is too long."""
        return False

    def null(self) -> Tensor:
        return _word("")[None]

    def facts(self) -> dict[str, Any]:
        return {"encoder": "stand-in", "fingerprint": self.fingerprint, "width": self.width, "max_tokens": 8}


def _word(word: str) -> Tensor:
    return torch.tensor([byte / 256 for byte in hashlib.sha256(word.encode()).digest()[: StandInText.width]])


def write_videos(folder: Path, videos: Sequence[Video], *, samples_per_shard: int = 3) -> Path:
    """A dataset of them: keys video-0, video-1, and so on."""
    store = Store(folder / "shards")
    with ShardWriter(store, "part", ShardLimits(samples=samples_per_shard)) as writer:
        for number, video in enumerate(videos):
            writer.add(_sample(folder, number, video))
    write_manifest(store, [index_name("part", number) for number in range(writer.shards)], "synthetic", {})
    return folder / "shards"


def _sample(folder: Path, number: int, video: Video) -> NewSample:
    data = b"no video"
    if not video.damaged:
        frames = moving_square(video.frames, video.height, video.width, seed=number)
        data = write_video(folder / "made" / f"{number}.mp4", frames, fps=video.fps).read_bytes()
    described = SampleFacts(
        video.said or video.frames, video.height, video.width, video.fps, f"{number}.mp4", video.caption
    )
    return NewSample(f"video-{number}", data, described)


def preencode_config(embedder: Path, data: Path, output: Path, **changes: Any) -> PreencodeConfig:
    """A config without text, of small batches."""
    values = {"embedder": str(embedder), "data": str(data), "output": str(output), "text": None, "batch_clips": 4}
    return PreencodeConfig.model_validate(values | changes)


# Captions of moving shapes, without the videos.


@cache
def captioned_scenes(number: int) -> tuple[tuple[Attributes, str], ...]:
    """Scenes and what is said of each: always the same."""
    drawn = random.Random(0)
    kinds = [list(names) for names in (COLOURS, SHAPES, SIZES, DIRECTIONS, SPEEDS, BACKGROUNDS)]
    scenes = [Attributes(*(drawn.choice(names) for names in kinds)) for _ in range(number)]
    return tuple((scene, caption(scene, drawn.randrange(WORDINGS))) for scene in scenes)
