"""Mean and std of each latent channel: what a model that works on latents normalises them with.

Legend: B clips, C channels, h x w latent cells.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from regen_dist.config.schema import DataConfig
from regen_dist.data.reading.loader import clip_batches
from regen_dist.data.reading.training_set import TrainingSet
from regen_dist.errors import CheckpointError
from regen_dist.jsontext import json_text
from regen_dist.models import Latents
from regen_dist.pixels import to_float

STATISTICS_FORMAT = 1


@dataclass(frozen=True, eq=False)
class ChannelStatistics:
    """Count, mean and spread of the values of each channel, in float64.

    Two of them add up to that of both sets of values (Chan, Golub and LeVeque 1983), so that many tasks can each take
    a part; with one value at a time this is Welford's method. Neither subtracts large sums from each other.

    Args:
        count: values of each channel.
        mean: [C].
        squares: [C], the sum of squared deviations from the mean.
    """

    count: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def of(cls, latents: Tensor) -> ChannelStatistics:
        """Those of latents [B, C, h, w] of any floating type; CheckpointError when a value is not
        finite."""
        values = latents.detach().transpose(0, 1).flatten(1).to("cpu", torch.float64)  # [C, B h w]
        if values.shape[1] == 0:
            return cls.nothing(values.shape[0])
        if not bool(values.isfinite().all()):
            raise CheckpointError("a latent is not finite, so the weights are broken; export an earlier --step")
        mean = values.mean(1)
        return cls(values.shape[1], mean, (values - mean[:, None]).square().sum(1))

    @classmethod
    def nothing(cls, channels: int) -> ChannelStatistics:
        """Those of no values: adding them changes nothing."""
        return cls(0, torch.zeros(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64))

    def __add__(self, other: ChannelStatistics) -> ChannelStatistics:
        count = self.count + other.count
        if not self.count or not other.count:
            return self if self.count else other
        delta, share = other.mean - self.mean, other.count / count
        squares = self.squares + other.squares + delta.square() * (self.count * share)
        return ChannelStatistics(count, self.mean + delta * share, squares)

    @property
    def std(self) -> Tensor:
        """[C], of all the values (divided by their number, not by one less)."""
        return (self.squares / max(self.count, 1)).sqrt()

    def to_json(self) -> dict[str, Any]:
        """Plain numbers; `from_json` gives back the same bits."""
        return {
            "count": self.count,
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
            "squares": self.squares.tolist(),
        }

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> ChannelStatistics:
        """What `to_json` gave."""
        mean, squares = (torch.tensor(found[name], dtype=torch.float64) for name in ("mean", "squares"))
        if mean.ndim != 1 or mean.shape != squares.shape:
            raise ValueError(f"mean has {tuple(mean.shape)} values and squares {tuple(squares.shape)}")
        return cls(int(found["count"]), mean, squares)


@dataclass(frozen=True, eq=False)
class LatentSpread:
    """Statistics of the latents of some clips. The motion latent of images is zero by construction: None."""

    num_clips: int
    content: ChannelStatistics
    motion: ChannelStatistics | None

    @classmethod
    def of(cls, latents: Latents, *, images: bool = False) -> LatentSpread:
        """That of a batch."""
        motion = None if images else ChannelStatistics.of(latents.motion)
        return cls(len(latents.content), ChannelStatistics.of(latents.content), motion)

    def __add__(self, other: LatentSpread) -> LatentSpread:
        if (self.motion is None) != (other.motion is None):
            raise ValueError("clips and images are counted apart")
        motion = None if self.motion is None or other.motion is None else self.motion + other.motion
        return LatentSpread(self.num_clips + other.num_clips, self.content + other.content, motion)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        motion = None if self.motion is None else self.motion.to_json()
        return {"num_clips": self.num_clips, "content": self.content.to_json(), "motion": motion}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> LatentSpread:
        """What `to_json` gave."""
        motion = None if found["motion"] is None else ChannelStatistics.from_json(found["motion"])
        return cls(int(found["num_clips"]), ChannelStatistics.from_json(found["content"]), motion)


@dataclass(frozen=True, eq=False)
class LatentStatistics:
    """What `statistics.json` holds: of clips and, apart from them, of images, where the run was trained on such.

    `measured_on` says on which data: the dataset's fingerprints, sides, frames, seed.
    """

    clips: LatentSpread | None
    images: LatentSpread | None
    measured_on: dict[str, Any]

    def to_text(self) -> str:
        """JSON; equal numbers give equal bytes."""
        parts = {name: None if part is None else part.to_json() for name, part in self._parts().items()}
        return json_text({"format": STATISTICS_FORMAT, **parts, "measured_on": self.measured_on}, indent=1) + "\n"

    def __add__(self, other: LatentStatistics) -> LatentStatistics:
        """Those of both sets of latents."""
        clips, images = (
            mine + theirs if mine and theirs else mine or theirs
            for mine, theirs in ((self.clips, other.clips), (self.images, other.images))
        )
        return LatentStatistics(clips, images, self.measured_on)

    def _parts(self) -> dict[str, LatentSpread | None]:
        return {"clips": self.clips, "images": self.images}


def read_statistics(path: Path) -> LatentStatistics | None:
    """The statistics in a file; None when there is none.

    Raises:
        CheckpointError: the file cannot be read as what `LatentStatistics.to_text` writes.
    """
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} holds no latent statistics: {type(error).__name__}: {error}") from error
    return parse_statistics(found, str(path))


def parse_statistics(found: Mapping[str, Any], where: str) -> LatentStatistics:
    """The statistics in parsed JSON.

    Raises:
        CheckpointError: it is not what `LatentStatistics.to_text` writes; `where` says whose it is.
    """
    try:
        if found["format"] != STATISTICS_FORMAT:
            raise ValueError(f"it has format {found['format']}, this version reads {STATISTICS_FORMAT}")
        clips, images = (
            LatentSpread.from_json(part) if (part := found[name]) else None for name in ("clips", "images")
        )
        return LatentStatistics(clips, images, found["measured_on"])
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{where} holds no latent statistics: {type(error).__name__}: {error}") from error


class Encoder(Protocol):
    """What measuring needs of a codec."""

    num_frames: int

    def encode(self, clips: Tensor) -> Latents:
        """Clips [B, 3, T, H, W] in [-1, 1] to latents [B, C, h, w]."""


def measure_statistics(
    codec: Encoder, data: DataConfig, *, num_clips: int, seed: int, progress: Callable[[int, int], None] | None = None
) -> LatentStatistics:
    """Encode clips of the training data, drawn as training draws them, and count them channel by channel.

    Args:
        codec: with the weights whose latents they are.
        data: where the clips come from, and how they are cut. As many images are encoded as clips, where
            `image_fraction` says that there are any.
        num_clips: how many.
        seed: of the draw.
        progress: told (clips and images done, of how many).

    Raises:
        DataError: the data cannot be read.
        CheckpointError: a latent is not finite.
    """
    kinds = [False] * (data.image_fraction < 1) + [True] * (data.image_fraction > 0)
    spreads: dict[bool, LatentSpread] = {}
    facts: dict[str, str] = {}
    for images in kinds:
        part = data.model_copy(update={"image_fraction": float(images), "workers": 0})
        drawn = TrainingSet(part, num_frames=codec.num_frames, batch_global=1, seed=seed)
        facts |= drawn.identity()
        for number, clip in enumerate(islice(_clips(drawn), num_clips), 1):
            spread = LatentSpread.of(codec.encode(clip), images=images)
            spreads[images] = spreads[images] + spread if images in spreads else spread
            if progress is not None:
                progress(number + num_clips * (len(spreads) - 1), num_clips * len(kinds))
    facts["data.image_fraction"] = str(data.image_fraction)
    measured_on = {name: fact for name, fact in facts.items() if name != "train.batch_global"}
    return LatentStatistics(spreads.get(False), spreads.get(True), measured_on)


def _clips(data: TrainingSet) -> Iterator[Tensor]:
    """Clips [1, 3, T, H, W] in [-1, 1], one after the other: the buckets mix as finely as they can."""
    batches = clip_batches(data, accumulation=1, rank=0, world_size=1, cursor=0)
    try:
        for batch in batches:
            yield to_float(batch.video)
    finally:
        batches.close()
