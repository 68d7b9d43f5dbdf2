"""Compared videos of moving shapes (held-out, reconstructed, generated): how often a detector reads them right, and how
visible the seams between their clips are."""

from __future__ import annotations

import base64
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from regen_dist.data.format.catalogue import Dataset
from regen_dist.data.format.index import Sample, samples_of
from regen_dist.data.synthetic.shapes import (
    Attributes,
    Combination,
    parse_caption,
    split_combinations,
)
from regen_dist.data.video.conversion import frame_to_rgb
from regen_dist.data.video.reader import VideoReader
from regen_dist.errors import DataError
from regen_dist.evaluation.metrics import frame_change, psnr_db, seam_ratio, squared_error
from regen_dist.evaluation.shapes import Reading, read
from regen_dist.models.encoder import Latents
from regen_dist.pixels import to_frames, to_video

_NUMBERED = re.compile(r"\d+(-\d+)?")  # with several samples of a prompt, each has its own number
UInt8s = npt.NDArray[np.uint8]


class ClipCodec(Protocol):
    """Interface of a codec: `regen_dist.inference.codec.Codec`, or any object with the same methods."""

    num_frames: int

    def encode(self, clips: Tensor) -> Latents:
        """Encode clips [B, 3, T, H, W] in [-1, 1], T of 1 or `num_frames`, to latents."""
        ...

    def decode(self, latents: Latents, times: Tensor, *, starts: list[float]) -> Tensor:
        """Decode clips [B, 3, T, H, W] in [-1, 1] at `times` [T], counted from each clip's first frame."""
        ...


class ShapeClip(NamedTuple):
    """A video and its wanted attributes: frames uint8 RGB [T, H, W, 3], `fps` of them a second. The first `given` were
    not generated and are not read."""

    name: str
    caption: str
    wanted: Attributes
    frames: UInt8s
    fps: float
    given: int = 0


def generated_names(folder: Path, number: int) -> list[str]:
    """List the first videos that `regen generate` wrote into a folder, by name. The JSON of a video is written last, so
    a video without it is unfinished and not counted."""
    return sorted(path.stem for path in folder.glob("*.json") if _NUMBERED.fullmatch(path.stem))[:number]


def generated_facts(folder: Path, names: Iterable[str]) -> dict[str, Any]:
    """Facts that the JSON files of all these videos share about their making."""
    kept: dict[str, Any] | None = None
    for name in names:
        facts = recorded_facts(folder / f"{name}.json")
        kept = facts if kept is None else {key: value for key, value in kept.items() if facts.get(key) == value}
    return {key: value for key, value in (kept or {}).items() if key != "prompt"}


def generated_prompts(folder: Path, names: Iterable[str]) -> list[str]:
    """Prompts of generated videos. Raises DataError naming a JSON file that records none."""
    prompts = []
    for name in names:
        prompt = recorded_facts(folder / f"{name}.json").get("prompt")
        if not isinstance(prompt, str):
            raise DataError(f"{folder / name}.json says no prompt; generate the videos again with `regen generate`")
        prompts.append(prompt)
    return prompts


def generated_clips(folder: Path, names: Sequence[str]) -> Iterator[ShapeClip]:
    """Yield generated videos with their prompts. Raises DataError naming a file that cannot be used."""
    for name, prompt in zip(names, generated_prompts(folder, names), strict=True):
        video = folder / f"{name}.mp4"
        if not video.is_file():
            raise DataError(f"{video} is missing, though {name}.json is there; generate the videos again")
        clip, facts = _decoded(f"{name}.mp4", prompt, video, str(video)), recorded_facts(folder / f"{name}.json")
        is_continued = given_kind(facts) == "video"
        yield clip._replace(given=len(clip.frames) - facts["settings"]["frames"]) if is_continued else clip


def given_kind(facts: Mapping[str, Any]) -> str | None:
    """Kind of what a generated video began with, by its record: `image`, `video`, or None for nothing."""
    kind: str | None = (facts.get("given") or {}).get("kind")
    return kind


def held_out_samples(dataset: Dataset, number: int) -> list[Sample]:
    """Read the first samples of a dataset, from its whole index."""
    samples: list[Sample] = samples_of(dataset.table().slice(0, number))
    return samples


def held_out_clips(dataset: Dataset, samples: Iterable[Sample], clip_frames: int | None) -> Iterator[ShapeClip]:
    """Yield videos of a dataset with their captions, each cut to whole clips of `clip_frames` (None: uncut)."""
    for sample in samples:
        if sample.caption is None:
            raise DataError(f"{sample.name} of {dataset.store.url} has no caption, so its content is unknown")
        clip = _decoded(sample.key, sample.caption, dataset.read(sample), sample.name)
        yield clip._replace(frames=clip.frames[: whole_frames(len(clip.frames), clip_frames)])


def whole_frames(num_frames: int, clip_frames: int | None) -> int:
    """Number of frames of a video that are encoded: whole clips, or a single frame of a shorter video."""
    return num_frames if clip_frames is None else max(1, num_frames // clip_frames * clip_frames)


def reconstructed(clip: ShapeClip, codec: ClipCodec) -> ShapeClip:
    """Reconstruct a video with a codec in one step, clip by clip without overlap, as in a latent cache.

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
    """Number of these videos whose combination of colour, shape and direction the dataset's options do not hold out;
    None where the dataset does not record its held-out combinations."""
    share = dataset.manifest.options.get("held_out_share")
    if not isinstance(share, float):
        return None
    held_out = set(split_combinations(share)[1])
    return sum(Combination(each.colour, each.shape, each.direction) not in held_out for each in wanted)


def recorded_facts(path: Path) -> dict[str, Any]:
    """Facts of a generated video, from its JSON file. Raises DataError when it is damaged."""
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


# Accuracy of the readings: shares with their intervals, confusions, and the chance level.
ATTRIBUTES = ("colour", "shape", "direction")
ALL = "all three"
MEASURES = (*ATTRIBUTES, ALL)
TARGETS = {"colour": 0.95, "shape": 0.85, "direction": 0.90, ALL: 0.80}  # shares of the generated videos
LEAST_VIDEOS = 200  # a share of fewer videos is too uncertain
NOTHING = "nothing"  # name of a reading of None
_QUANTILE = 1.959964  # of the normal distribution, for 95 %

Confusion = dict[str, dict[str, int]]  # wanted value: read value: count


@dataclass(frozen=True)
class Fraction:
    """A share: `right` of `number`, which is at least one."""

    right: int
    number: int

    @property
    def value(self) -> float:
        return self.right / self.number

    def interval(self) -> tuple[float, float]:
        """The 95 % interval of Wilson (1927), which stays inside [0, 1] and is not empty at either end."""
        number, share, z2 = self.number, self.value, _QUANTILE**2
        middle = (share + z2 / (2 * number)) / (1 + z2 / number)
        half = _QUANTILE / (1 + z2 / number) * sqrt(share * (1 - share) / number + z2 / (4 * number**2))
        return max(0.0, middle - half), min(1.0, middle + half)

    def to_json(self) -> dict[str, Any]:
        return {"right": self.right, "number": self.number, "share": self.value, "interval_95": list(self.interval())}


def score_arm(readings: Sequence[Reading], wanted: Sequence[Attributes]) -> dict[str, Fraction]:
    """Share of the readings that are right, for each of MEASURES.

    Raises:
        DataError: there are no readings.
    """
    if not readings:
        raise DataError("there are no videos to score; give a folder of `regen generate`")
    right: Counter[str] = Counter()
    for reading, attributes in zip(readings, wanted, strict=True):
        hits = [name for name in ATTRIBUTES if getattr(reading, name) == getattr(attributes, name)]
        right.update(hits if len(hits) < len(ATTRIBUTES) else MEASURES)
    return {name: Fraction(right[name], len(readings)) for name in MEASURES}


def confusions(readings: Sequence[Reading], wanted: Sequence[Attributes]) -> dict[str, Confusion]:
    """Confusion counts for each of ATTRIBUTES: wanted value, read value, number of videos."""
    found: dict[str, Confusion] = {name: {} for name in ATTRIBUTES}
    for reading, attributes in zip(readings, wanted, strict=True):
        for name in ATTRIBUTES:
            row = found[name].setdefault(getattr(attributes, name), {})
            read = getattr(reading, name) or NOTHING
            row[read] = row.get(read, 0) + 1
    return found


def derangement(count: int, seed: int = 0) -> list[int]:
    """A fixed order of 0 to `count` - 1, at least 2, in which nothing keeps its place: one cycle (Sattolo, 1986)."""
    random, order = np.random.default_rng(seed), list(range(count))
    for last in range(count - 1, 0, -1):
        other = int(random.integers(last))
        order[last], order[other] = order[other], order[last]
    return order


def missed_targets(scores: dict[str, Fraction]) -> list[str]:
    """Describe the TARGETS that the generated videos miss; empty when they meet them all."""
    number = scores[ALL].number
    found = [f"{number} videos, at least {LEAST_VIDEOS} are asked for"] if number < LEAST_VIDEOS else []
    return found + [
        f"{name} {scores[name].value:.1%}, the target is {target:.0%}"
        for name, target in TARGETS.items()
        if scores[name].value < target
    ]


REAL, RECONSTRUCTED, WRONG_CAPTIONS = "real", "reconstructed", "wrong captions"
_QUALITY = 80  # quality of WebP


@dataclass(frozen=True)
class ScoredVideo:
    """A video with its reading."""

    name: str
    caption: str
    wanted: Attributes
    reading: Reading

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "caption": self.caption, "read": self.reading._asdict()}


@dataclass
class ScoredVideos:
    """Videos of one kind. `facts` record their making, `previews` hold data URIs by caption."""

    name: str
    facts: Mapping[str, Any]
    videos: list[ScoredVideo] = field(default_factory=list)
    previews: dict[str, str] = field(default_factory=dict)
    seams: SeamMeter | None = None

    def add(self, clip: ShapeClip, shown: Collection[str]) -> None:
        """Read a video; keep a preview if its caption is one of those shown on the page."""
        reading = read(clip.frames[clip.given :], 1 - clip.given / len(clip.frames))
        self.videos.append(ScoredVideo(clip.name, clip.caption, clip.wanted, reading))
        if self.seams is not None:
            self.seams.add(clip.frames)
        if clip.caption in shown and clip.caption not in self.previews:
            self.previews[clip.caption] = animation(clip)

    @property
    def scores(self) -> dict[str, Fraction]:
        return score_arm(self._readings, [video.wanted for video in self.videos])

    @property
    def confusions(self) -> dict[str, Confusion]:
        return confusions(self._readings, [video.wanted for video in self.videos])

    def reading_of(self, caption: str) -> Reading | None:
        """Reading of the video that is shown for a caption."""
        return next((video.reading for video in self.videos if video.caption == caption), None)

    def to_json(self) -> dict[str, Any]:
        return {
            "facts": dict(self.facts),
            "scores": {name: share.to_json() for name, share in self.scores.items()},
            "confusions": self.confusions,
            "seams": None if self.seams is None else self.seams.to_json(),
            "videos": [video.to_json() for video in self.videos],
        }

    @property
    def _readings(self) -> list[Reading]:
        return [video.reading for video in self.videos]


def read_arm(
    name: str,
    clips: Iterable[ShapeClip],
    facts: Mapping[str, Any],
    shown: Collection[str] = (),
    progress: Callable[[int], None] = lambda done: None,
    clip_frames: int | None = None,
) -> ScoredVideos:
    """Read all videos of an arm.

    Args:
        name: name of the arm on the page.
        clips: videos of the arm.
        facts: facts about their making.
        shown: captions whose videos are kept for the page.
        progress: called with the number of videos read so far.
        clip_frames: frames of the embedder's clips, to measure the seams between them; None: they are not measured.
    """
    arm = ScoredVideos(name, facts, seams=None if clip_frames is None else SeamMeter(clip_frames))
    for number, clip in enumerate(clips, 1):
        arm.add(clip, shown)
        progress(number)
    return arm


def with_wrong_captions(arm: ScoredVideos) -> ScoredVideos | None:
    """Score the same readings against captions of other videos, which gives the chance level. None where there are
    fewer than two videos."""
    if len(arm.videos) < 2:
        return None
    order = derangement(len(arm.videos))
    videos = [
        ScoredVideo(video.name, arm.videos[other].caption, arm.videos[other].wanted, video.reading)
        for video, other in zip(arm.videos, order, strict=True)
    ]
    return ScoredVideos(
        WRONG_CAPTIONS, {"videos": arm.name, "captions": "exchanged among them, none keeps its own"}, videos
    )


def animation(clip: ShapeClip) -> str:
    """Encode a video as an animated WebP in a data URI, which plays in every browser without further files."""
    from PIL import Image

    first, *others = [Image.fromarray(frame) for frame in clip.frames]
    buffer = io.BytesIO()
    milliseconds = max(1, round(1000 / clip.fps))
    first.save(
        buffer, "WEBP", save_all=True, append_images=others, duration=milliseconds, loop=0, quality=_QUALITY, method=4
    )
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


# Videos of several clips: how visible the seams between clips are, and how well a given first clip is continued.
#
# Legend: T frames, H x W pixels; a clip is the k + 1 frames that the embedder encodes together.


LEAST_DIRECTION = 0.85  # target: videos that go on from an image or a clip and still move as their captions say


@dataclass
class SeamMeter:
    """Accumulator of the changes between frames, over all videos of an arm. Videos of one clip have no seam."""

    clip_frames: int
    videos: int = 0
    _changes: list[float] = field(default_factory=list)
    _crosses: list[bool] = field(default_factory=list)

    def add(self, frames: UInt8s) -> None:
        """Measure a video, uint8 [T, H, W, 3], whose clips begin at multiples of `clip_frames`."""
        if len(frames) <= self.clip_frames:
            return
        self.videos += 1
        for number in range(1, len(frames)):
            self._changes.append(frame_change(frames[number - 1], frames[number]))
            self._crosses.append(number % self.clip_frames == 0)

    def to_json(self) -> dict[str, Any] | None:
        """The seam ratio over all videos, with the mean changes at and between the seams; None without a seam."""
        ratio = seam_ratio(self._changes, self._crosses) if self._changes else None
        if ratio is None:
            return None
        changes, crosses = np.array(self._changes), np.array(self._crosses)
        return {
            "videos": self.videos,
            "seam_ratio": ratio,
            "change_at_seams": float(changes[crosses].mean()),
            "change_inside": float(changes[~crosses].mean()),
        }


@dataclass
class ContinuationMeter:
    """Accumulator of the distance of continued videos from the videos that they continue. A shape on a straight line
    at a constant speed can only go on in one way, so the source's own frames are the answer."""

    _made: list[float] = field(default_factory=list)
    _own: list[float] = field(default_factory=list)
    _last_given: list[float] = field(default_factory=list)
    _added: list[int] = field(default_factory=list)

    def add(self, made: UInt8s, source: UInt8s, own: UInt8s, given: int) -> None:
        """Compare the frames after the given ones.

        Args:
            made: the continued video, [T, H, W, 3].
            source: the video whose first `given` frames were given.
            own: reconstruction of the source by the embedder.
            given: number of frames that were given.
        """
        frames = range(given, min(len(made), len(source), len(own)))
        self._added.append(len(made) - given)
        self._made.append(_psnr(made, source, frames))
        self._own.append(_psnr(own, source, frames))
        self._last_given.append(psnr_db(float(np.mean([squared_error(source[given - 1], source[t]) for t in frames]))))

    def to_json(self, direction: float) -> dict[str, Any]:
        """Mean PSNR of the added frames, of the embedder's, and of the last given frame held; `direction` is the share
        of the videos whose added frames move as their captions say."""
        return {
            "videos": len(self._made),
            "added_frames": max(self._added, default=0),
            "psnr_db": float(np.mean(self._made)),
            "embedder_psnr_db": float(np.mean(self._own)),
            "held_psnr_db": float(np.mean(self._last_given)),
            "direction": direction,
            "targets": {"least_direction": LEAST_DIRECTION},
        }


def _psnr(one: UInt8s, other: UInt8s, frames: range) -> float:
    return psnr_db(float(np.mean([squared_error(other[t], one[t]) for t in frames])))


def missed_continuations(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Describe the missed targets of continued videos."""
    return [
        f"{name}: direction of the added frames {figures['direction']:.1%}, the target is {LEAST_DIRECTION:.0%}"
        for name, figures in found.items()
        if figures["direction"] < LEAST_DIRECTION
    ]
