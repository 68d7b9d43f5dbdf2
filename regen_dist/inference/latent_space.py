"""Latent space of a text-to-video model: latents normalised by the mean and std of each channel (by a part of the std
only, where the run says so).

`NormalisedLatents` are a separate type, so that nothing can decode them by mistake: a codec takes `Latents` only, and
only `LatentScale.restore` converts one to the other.

Legend: B batch, n clips, C channels, h x w latent cells, F latent frames: 2n (content, motion of each clip), or 1 for
an image.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from regen_dist.config.datasets import DataConfig
from regen_dist.config.files import write_bytes_atomically, write_text_atomically
from regen_dist.data.format.latents import CacheFacts, TextEmbedding, pack_null_text, unpack_null_text
from regen_dist.data.loading.clip_loader import clip_batches
from regen_dist.data.loading.datasets import TrainingSet
from regen_dist.errors import CheckpointError, DataError
from regen_dist.jsontext import json_text
from regen_dist.models.encoder import Latents
from regen_dist.pixels import to_float

# Mean and std of each latent channel, with which a model of latents normalises them.
#
# Legend: B clips, C channels, h x w latent cells.

STATISTICS_FORMAT = 1


@dataclass(frozen=True, eq=False)
class ChannelStatistics:
    """Count, mean and spread of the values of each channel, in float64.

    The sum of two is the statistics of both sets of values (Chan, Golub and LeVeque 1983), so that many tasks can each
    take a part; with one value at a time this is Welford's method. Neither subtracts large sums from each other.

    Args:
        count: number of values in each channel.
        mean: mean of each channel, [C].
        squares: [C], the sum of squared deviations from the mean.
    """

    count: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def of(cls, latents: Tensor) -> ChannelStatistics:
        """Compute the statistics of latents [B, C, h, w] of any floating type; CheckpointError when a value is not
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
        """Return the statistics of no values, the neutral element of addition."""
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
        """Standard deviation of each channel, [C] (divided by the number of values, not by one less)."""
        return (self.squares / max(self.count, 1)).sqrt()

    def to_json(self) -> dict[str, Any]:
        """Convert to plain numbers; `from_json` restores the same bits."""
        return {
            "count": self.count,
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
            "squares": self.squares.tolist(),
        }

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> ChannelStatistics:
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
        motion = None if images else ChannelStatistics.of(latents.motion)
        return cls(len(latents.content), ChannelStatistics.of(latents.content), motion)

    def __add__(self, other: LatentSpread) -> LatentSpread:
        if (self.motion is None) != (other.motion is None):
            raise ValueError("clips and images are counted apart")
        motion = None if self.motion is None or other.motion is None else self.motion + other.motion
        return LatentSpread(self.num_clips + other.num_clips, self.content + other.content, motion)

    def to_json(self) -> dict[str, Any]:
        motion = None if self.motion is None else self.motion.to_json()
        return {"num_clips": self.num_clips, "content": self.content.to_json(), "motion": motion}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> LatentSpread:
        motion = None if found["motion"] is None else ChannelStatistics.from_json(found["motion"])
        return cls(int(found["num_clips"]), ChannelStatistics.from_json(found["content"]), motion)


@dataclass(frozen=True, eq=False)
class LatentStatistics:
    """Content of `statistics.json`: statistics of clips and, where the run was trained on images, of images.

    `measured_on` describes the data: the dataset's fingerprints, sides, frames, seed.
    """

    clips: LatentSpread | None
    images: LatentSpread | None
    measured_on: dict[str, Any]

    def to_text(self) -> str:
        """Serialise to JSON; equal numbers give equal bytes."""
        clips, images = (None if part is None else part.to_json() for part in (self.clips, self.images))
        parts = {"clips": clips, "images": images}
        return json_text({"format": STATISTICS_FORMAT, **parts, "measured_on": self.measured_on}, indent=1) + "\n"

    def __add__(self, other: LatentStatistics) -> LatentStatistics:
        return LatentStatistics(added(self.clips, other.clips), added(self.images, other.images), self.measured_on)


def added(one: LatentSpread | None, other: LatentSpread | None) -> LatentSpread | None:
    """Return the sum of two spreads, either of which may be of nothing."""
    return one + other if one and other else one or other


def read_statistics(path: Path) -> LatentStatistics | None:
    """Read the statistics in a file; None when there is none.

    Raises:
        CheckpointError: the file is not in the format that `LatentStatistics.to_text` writes.
    """
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} holds no latent statistics: {type(error).__name__}: {error}; copy the run or the export again"
        ) from error
    return parse_statistics(found, str(path))


def parse_statistics(found: Mapping[str, Any], where: str) -> LatentStatistics:
    """Build the statistics from parsed JSON.

    Raises:
        CheckpointError: the JSON is not in the format of `LatentStatistics.to_text`; the message names `where`.
    """
    try:
        if found["format"] != STATISTICS_FORMAT:
            raise ValueError(f"it has format {found['format']}, this version reads {STATISTICS_FORMAT}")
        clips, images = (
            LatentSpread.from_json(part) if (part := found[name]) else None for name in ("clips", "images")
        )
        return LatentStatistics(clips, images, found["measured_on"])
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{where} holds no latent statistics: {type(error).__name__}: {error}; copy the run or the export again"
        ) from error


class LatentEncoder(Protocol):
    """Interface of a codec for measuring statistics."""

    num_frames: int

    def encode(self, clips: Tensor) -> Latents:
        """Encode clips [B, 3, T, H, W] in [-1, 1] to latents [B, C, h, w]."""


def measure_statistics(
    codec: LatentEncoder,
    data: DataConfig,
    *,
    num_clips: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> LatentStatistics:
    """Encode clips of the training data, drawn as in training, and measure the statistics of each channel.

    Args:
        codec: codec whose latents are measured.
        data: source of the clips, and the way they are cut. As many images as clips are encoded, where
            `image_fraction` is above 0.
        num_clips: number of clips.
        seed: seed of the draw.
        progress: called with (clips and images done, total).

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
    """Yield clips [1, 3, T, H, W] in [-1, 1] one by one, with the buckets mixed as finely as possible."""
    batches = clip_batches(data, accumulation=1, rank=0, world_size=1, cursor=0)
    try:
        for batch in batches:
            yield to_float(batch.video)
    finally:
        batches.close()


_LEAST_STD = 1e-4  # a constant channel is left unscaled


@dataclass(frozen=True, eq=False)
class NormalisedLatents:
    """Latent frames of a row of clips, normalised: float32 [B, C, F, h, w]."""

    frames: Tensor

    @property
    def is_image(self) -> bool:
        """True when each row is only the content latent of an image."""
        return self.frames.shape[2] == 1


class LatentScale:
    """Normalisation of latents by the mean and std of each channel, and its inverse.

    Content and motion have separate statistics. An image (F = 1) uses those of images, where they were measured, and
    otherwise those of clips' content, which are latents of first frames, too.
    """

    def __init__(self, statistics: LatentStatistics, whitening: float = 1.0) -> None:
        """Prepare the scale. `whitening` in [0, 1] is the share of the channels' differences in strength that is
        removed: 1 gives each a std of 1, less leaves std^(1 - whitening), scaled so that the mean square over the
        channels is 1."""
        clips, images = statistics.clips, statistics.images
        content = clips or images
        if content is None:
            raise CheckpointError("the latent statistics are of nothing; run `regen preencode` again")
        motion = None if clips is None else clips.motion
        self._clip = [_scale(content.content, whitening), _scale(motion or content.content, whitening)]
        self._image = _scale((images or content).content, whitening)
        self._copies: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}  # of `_of`: made once for a device

    def normalise(self, content: Tensor, motion: Tensor) -> NormalisedLatents:
        """Normalise latents of rows, each [B, n, C, h, w] of any floating type; images have motion [B, 0, C, h, w]."""
        if motion.shape[1] == 0:
            frames = content[:, :1].float()
        elif motion.shape == content.shape:
            frames = torch.stack([content.float(), motion.float()], 2).flatten(1, 2)  # [B, 2n, C, h, w]
        else:
            raise DataError(f"content {list(content.shape)} and motion {list(motion.shape)} are not of the same clips")
        mean, std = self._of(frames)
        return NormalisedLatents(((frames - mean) / std).transpose(1, 2).contiguous())

    def restore(self, latents: NormalisedLatents) -> list[Latents]:
        """Restore the latents of each clip of the row for a codec: [B, C, h, w] each; an image's motion is zero."""
        frames = latents.frames.transpose(1, 2)  # [B, F, C, h, w]
        mean, std = self._of(frames)
        raw = frames * std + mean
        if latents.is_image:
            return [Latents(raw[:, 0], torch.zeros_like(raw[:, 0]))]
        return [Latents(raw[:, frame], raw[:, frame + 1]) for frame in range(0, raw.shape[1], 2)]

    def _of(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std for each frame of [B, F, C, h, w], as [1, F, C, 1, 1]."""
        key = frames.shape[1], frames.device
        if key not in self._copies:
            each = [self._image] if frames.shape[1] == 1 else self._clip * (frames.shape[1] // 2)
            mean, std = (torch.stack([one[part] for one in each]).to(frames.device) for part in (0, 1))
            self._copies[key] = mean[None, :, :, None, None], std[None, :, :, None, None]
        return self._copies[key]


def only_raw(latents: Latents) -> Latents:
    """Return raw latents unchanged; DataError for normalised ones, which would decode to a meaningless video."""
    if not isinstance(latents, Latents):
        raise DataError(
            f"a codec decodes Latents, found {type(latents).__name__}; of normalised latents LatentScale.restore makes "
            "them, with the statistics that they were normalised by"
        )
    return latents


def _scale(of: ChannelStatistics, whitening: float) -> tuple[Tensor, Tensor]:
    """Offset and divisor of each channel."""
    std = of.std.float()
    known = torch.where(std < _LEAST_STD, 1.0, std)
    left = known ** (1 - whitening)
    return of.mean.float(), known / left * left.square().mean().sqrt()


# Latent space of the caches that a run was trained on. Generating needs it beside the weights, so it is kept in the
# run folder and in every exported model.
#
# FOLDER/latent_space/null_text.safetensors    the embedding of the empty caption
# FOLDER/latent_space/facts.json               encoder, text encoder, statistics, whitening, frame rate; written last

SPACE_FOLDER, _FACTS, _NULL = "latent_space", "facts.json", "null_text.safetensors"
_KEPT = ("fingerprint", "num_frames", "channels", "fps", "encoder", "preprocessing", "text")


@dataclass(frozen=True, eq=False)
class LatentSpace:
    """The space of a text-to-video model: `facts` (JSON; see `CacheFacts`), the latents' statistics, and the empty
    caption's embedding."""

    facts: Mapping[str, Any]
    statistics: LatentStatistics
    null_text: TextEmbedding

    @property
    def scale(self) -> LatentScale:
        """Normalisation of this space's latents, and its inverse."""
        return LatentScale(self.statistics, float(self.facts.get("whitening", 1.0)))

    @property
    def num_frames(self) -> int:
        return int(self.facts["num_frames"])

    @property
    def fps(self) -> float:
        """Frames per second of the training videos."""
        return float(self.facts["fps"])

    @classmethod
    def of(
        cls,
        facts: CacheFacts,
        statistics: LatentStatistics,
        null_text: TextEmbedding,
        sizes: Sequence[tuple[int, int]] = (),
        whitening: float = 1.0,
    ) -> LatentSpace:
        """Build the space of a cache; `sizes` are its videos' (height, width), `whitening` as for `LatentScale`."""
        known = {name: getattr(facts, name) for name in _KEPT}
        kept = {name: dict(value) if isinstance(value, Mapping) else value for name, value in known.items()}
        return cls({**kept, "sizes": [list(size) for size in sizes], "whitening": whitening}, statistics, null_text)

    def to_json(self) -> dict[str, Any]:
        return {**self.facts, "statistics": json.loads(self.statistics.to_text())}

    def write(self, folder: Path) -> None:
        """Write the space into a run folder or an exported model, unless the same is there already."""
        place = folder / SPACE_FOLDER
        text = json_text(self.to_json(), indent=1) + "\n"
        are_there = all((place / name).is_file() for name in (_NULL, _FACTS))
        if are_there and (place / _FACTS).read_text(encoding="utf-8") == text:
            return
        place.mkdir(parents=True, exist_ok=True)
        write_bytes_atomically(place / _NULL, pack_null_text(self.null_text.text))
        write_text_atomically(place / _FACTS, text)


def read_space(folder: Path) -> LatentSpace:
    """Read the latent space of a text-to-video run or of an exported model.

    Raises:
        CheckpointError: the latent space is missing or damaged.
    """
    place = folder / SPACE_FOLDER
    try:
        facts = json.loads((place / _FACTS).read_text(encoding="utf-8"))
        statistics = parse_statistics(facts.pop("statistics"), str(place))
        return LatentSpace(facts, statistics, unpack_null_text((place / _NULL).read_bytes()))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{place} is not there or not whole ({error.filename}): is {folder} a text-to-video run that has begun to "
            "train? Copy it from the run, or run `regen train` again, which writes it"
        ) from None
    except (OSError, ValueError, KeyError, DataError) as error:
        raise CheckpointError(f"{place} is damaged ({type(error).__name__}: {error}); copy it from the run") from error
