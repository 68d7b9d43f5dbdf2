"""Arms of the comparison: videos of the same captions from different sources, all read by the same detector.

Real videos measure the detector's own errors, reconstructions those of the embedder, generated videos those of the
generator. Exchanged captions give the chance level.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from regen_dist.config.urls import parse_url
from regen_dist.data.format.catalogue import Dataset, open_dataset
from regen_dist.data.format.index import Sample, samples_of
from regen_dist.data.inspect.contact import choose_rows
from regen_dist.data.pool import Progress
from regen_dist.data.synthetic.shapes import (
    COLOURS,
    DIRECTIONS,
    SHAPES,
    Attributes,
    Combination,
    parse_caption,
    split_combinations,
)
from regen_dist.data.video.conversion import frame_to_rgb
from regen_dist.data.video.reader import VideoReader
from regen_dist.errors import ConfigError, DataError
from regen_dist.evaluation.clip_rows import LEAST_DIRECTION, ContinuationMeter, SeamMeter, missed_continuations
from regen_dist.evaluation.reconstruct import write_json
from regen_dist.evaluation.report import PAGE, Curve, draw_curves, page_environment, replace_file
from regen_dist.evaluation.shapes import Reading, read
from regen_dist.inference.codec import Codec
from regen_dist.models.encoder import Latents
from regen_dist.observe.hardware import describe_machine
from regen_dist.observe.record import read_record
from regen_dist.pixels import to_frames, to_video

# The compared videos: held-out ones, their reconstructions by an embedder, and generated ones.

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
        facts = _facts(folder / f"{name}.json")
        kept = facts if kept is None else {key: value for key, value in kept.items() if facts.get(key) == value}
    return {key: value for key, value in (kept or {}).items() if key != "prompt"}


def generated_prompts(folder: Path, names: Iterable[str]) -> list[str]:
    """Prompts of generated videos. Raises DataError naming a JSON file that records none."""
    prompts = []
    for name in names:
        prompt = _facts(folder / f"{name}.json").get("prompt")
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
        clip, facts = _decoded(f"{name}.mp4", prompt, video, str(video)), _facts(folder / f"{name}.json")
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
            raise DataError(f"{sample.name} of {dataset.store.url} has no caption, so nobody knows what it shows")
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
        """The share as a number between 0 and 1."""
        return self.right / self.number

    def interval(self) -> tuple[float, float]:
        """The 95 % interval of Wilson (1927), which stays inside [0, 1] and is not empty at either end."""
        number, share, z2 = self.number, self.value, _QUANTILE**2
        middle = (share + z2 / (2 * number)) / (1 + z2 / number)
        half = _QUANTILE / (1 + z2 / number) * sqrt(share * (1 - share) / number + z2 / (4 * number**2))
        return max(0.0, middle - half), min(1.0, middle + half)

    def to_json(self) -> dict[str, Any]:
        """Convert counts, share and interval to plain values."""
        return {"right": self.right, "number": self.number, "share": self.value, "interval_95": list(self.interval())}


def score_arm(readings: Sequence[Reading], wanted: Sequence[Attributes]) -> dict[str, Fraction]:
    """Share of the readings that are right, for each of MEASURES.

    Args:
        readings: readings of the videos.
        wanted: attributes that each video should show.

        Raises:
            DataError: there are no readings.
    """
    if not readings:
        raise DataError("there are no videos to score")
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
        """Convert to the video's line in scores.json."""
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
        """Share that is right, by measure."""
        return score_arm(self._readings, [video.wanted for video in self.videos])

    @property
    def confusions(self) -> dict[str, Confusion]:
        """Confusion counts, by attribute."""
        return confusions(self._readings, [video.wanted for video in self.videos])

    def reading_of(self, caption: str) -> Reading | None:
        """Reading of the video that is shown for a caption."""
        return next((video.reading for video in self.videos if video.caption == caption), None)

    def to_json(self) -> dict[str, Any]:
        """Convert to the arm's part of scores.json."""
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


# Page of the miniature: one self-contained `index.html`, which can be sent and kept as it is.

_VALUES = {"colour": tuple(COLOURS), "shape": tuple(SHAPES), "direction": tuple(DIRECTIONS)}


@dataclass(frozen=True)
class _Cell:
    """A share with its interval, as displayed; `met` says whether it reaches its target, where there is one."""

    share: str
    low: str
    high: str
    met: bool | None


@dataclass(frozen=True)
class _ScoreRow:
    """An arm in the table."""

    name: str
    main: bool
    number: int
    cells: list[_Cell]


@dataclass(frozen=True)
class _ShownSample:
    """A video on the page: its data URI, and the words of its reading, each with whether it is right."""

    arm: str
    image: str
    words: list[tuple[str, bool]]


@dataclass(frozen=True)
class _Grid:
    """Confusion table: `rows` hold the wanted value and, for each column, count and share of the row."""

    attribute: str
    columns: tuple[str, ...]
    rows: list[tuple[str, list[tuple[int, float]]]]


def write_page(
    out: Path,
    report: Mapping[str, Any],
    arms: Sequence[ScoredVideos],
    captions: Sequence[str],
    runs: Mapping[str, Path],
) -> Path:
    """Write `index.html` in one move.

    Args:
        out: existing folder.
        report: content of scores.json.
        arms: the arms after reading, with the videos of `captions`.
        captions: captions whose videos are shown.
        runs: name to run folder, for the curves; curves that a run lacks are left out.

    Returns:
        The page's path.
    """
    rows = [_row(arm, report) for arm in arms]
    text = (
        page_environment()
        .get_template("miniature.html.j2")
        .render(
            report=report,
            measures=MEASURES,
            targets={name: f"{target:.0%}" for name, target in TARGETS.items()},
            rows=rows,
            main=next((row for row in rows if row.main), None),
            gallery=[(caption, _videos(arms, caption)) for caption in captions],
            curves={name: found for name, run in runs.items() if (found := _curves(run))},
            grids={arm.name: _grids(arm) for arm in arms if arm.name != WRONG_CAPTIONS},
            made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        )
    )
    replace_file(out / PAGE, lambda file: file.write_text(text, encoding="utf-8"))
    return out / PAGE


def _row(arm: ScoredVideos, report: Mapping[str, Any]) -> _ScoreRow:
    main, scores = arm.name == report["targets_are_for"], arm.scores
    cells = []
    for name in MEASURES:
        low, high = (f"{100 * end:.0f}" for end in scores[name].interval())
        met = scores[name].value >= TARGETS[name] if main else None
        cells.append(_Cell(f"{scores[name].value:.1%}", low, high, met))
    return _ScoreRow(arm.name, main, len(arm.videos), cells)


def _videos(arms: Sequence[ScoredVideos], caption: str) -> list[_ShownSample]:
    """Video of each arm for a caption; arms without one are left out."""
    wanted, found = parse_caption(caption), []
    for arm in arms:
        reading = arm.reading_of(caption)
        if reading is not None and caption in arm.previews:
            found.append(_ShownSample(arm.name, arm.previews[caption], _words(reading, wanted)))
    return found


def _words(reading: Reading, wanted: Attributes) -> list[tuple[str, bool]]:
    if reading == (None, None, None):
        return [(NOTHING, False)]
    read = {name: getattr(reading, name) for name in ATTRIBUTES}
    return [(word or f"no {name}", word == getattr(wanted, name)) for name, word in read.items()]


def _curves(run: Path) -> list[Curve]:
    record = run / "metrics.jsonl"
    return draw_curves(read_record(record)) if record.is_file() else []


def _grids(arm: ScoredVideos) -> list[_Grid]:
    return [_grid(name, confusion) for name, confusion in arm.confusions.items()]


def _grid(attribute: str, confusion: Confusion) -> _Grid:
    values = _VALUES[attribute]
    columns = (*values, NOTHING)
    rows = []
    for wanted in values:
        counts = confusion.get(wanted, {})
        total = max(1, sum(counts.values()))
        rows.append((wanted, [(counts.get(read, 0), counts.get(read, 0) / total) for read in columns]))
    return _Grid(attribute, columns, rows)


# Videos generated from a given first frame: the distance of their own first frame from it, compared with the
# embedder's reconstruction, and whether they still move as their captions say.

MOST_LOST_DB = 1.0  # target of frame 0 against its reconstruction


def is_given(folder: Path, names: Sequence[str], kind: str = "image") -> bool:
    """Return whether the records of all these videos say that they were generated from an image, or a video."""
    return bool(names) and all(given_kind(_facts(folder / f"{name}.json")) == kind for name in names)


def judge_first_frames(
    dataset: Dataset, codec: ClipCodec, folder: Path, names: Sequence[str], arm: ScoredVideos
) -> dict[str, Any]:
    """Measure the mean PSNR of the first frames against the given ones, from held-out videos of the same numbers.

    Args:
        dataset: dataset of the held-out videos; the prompts are the captions of its first samples.
        codec: the embedder.
        folder, names: folder and names of the generated videos.
        arm: readings of the same videos.

        Raises:
            DataError: a prompt is not the caption of the sample with its number.
    """
    made, own = [], []
    for clip, source in _with_sources(dataset, codec, folder, names):
        made.append(_psnr(clip.frames[0], source.frames[0]))
        own.append(_psnr(reconstructed(source, codec).frames[0], source.frames[0]))
    direction = arm.scores["direction"].value
    return {
        "videos": len(names),
        "psnr_db": float(np.mean(made)),
        "embedder_psnr_db": float(np.mean(own)),
        "direction": direction,
        "targets": {"most_lost_db": MOST_LOST_DB, "least_direction": LEAST_DIRECTION},
    }


def judge_continuations(
    dataset: Dataset, codec: ClipCodec, folder: Path, names: Sequence[str], arm: ScoredVideos
) -> dict[str, Any]:
    """Measure continued videos against the held-out videos whose first clips they continue, as `judge_first_frames`
    does for images."""
    meter = ContinuationMeter()
    for clip, source in _with_sources(dataset, codec, folder, names):
        meter.add(clip.frames, source.frames, reconstructed(source, codec).frames, clip.given)
    return meter.to_json(arm.scores["direction"].value)


def _with_sources(
    dataset: Dataset, codec: ClipCodec, folder: Path, names: Sequence[str]
) -> Iterator[tuple[ShapeClip, ShapeClip]]:
    """Yield generated videos, each with the held-out video of its number; DataError where its prompt is another."""
    numbers = [int(name.split("-")[0]) for name in names]
    samples = held_out_samples(dataset, max(numbers) + 1)
    sources = held_out_clips(dataset, [samples[number] for number in numbers], codec.num_frames)
    for name, clip, source in zip(names, generated_clips(folder, names), sources, strict=True):
        if " ".join(source.caption.split()) != clip.caption:
            raise DataError(
                f"{folder / name}.json: its prompt is {clip.caption!r}, the held-out video of that number shows "
                f"{source.caption!r}; make the prompts and first frames again with `regen shards captions`"
            )
        yield clip, source


def missed_first_frames(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Describe the missed targets of first frames."""
    missed = []
    for name, figures in found.items():
        lost = figures["embedder_psnr_db"] - figures["psnr_db"]
        if lost > MOST_LOST_DB:
            missed.append(f"{name}: the first frame loses {lost:.2f} dB to the embedder's, allowed is {MOST_LOST_DB:g}")
        if figures["direction"] < LEAST_DIRECTION:
            missed.append(f"{name}: direction {figures['direction']:.1%}, the target is {LEAST_DIRECTION:.0%}")
    return missed


def _psnr(one: UInt8s, other: UInt8s) -> float:
    error = float(np.square(one.astype(np.float64) - other.astype(np.float64)).mean())
    return float(10 * np.log10(255**2 / max(error, 1e-3)))


# The job of `regen score-shapes`: read every available arm, and write scores.json and the page.

SCORES = "scores.json"


@dataclass(frozen=True)
class Request:
    """Inputs of a comparison.

    Args:
        held_out: URL of the held-out dataset: the real videos.
        embedder: a run or an exported model, for the reconstructions of the held-out videos.
        generated: name to folder of `regen generate`; the targets apply to the first.
        runs: name to run folder, for the curves.
        number: largest number of videos in an arm.
        previews: number of videos of each arm on the page.
        solvers: record of `regen bench solvers`, shown on the page.
    """

    held_out: str | None = None
    embedder: Path | None = None
    generated: Mapping[str, Path] = field(default_factory=dict)
    runs: Mapping[str, Path] = field(default_factory=dict)
    number: int = LEAST_VIDEOS
    previews: int = 12
    solvers: Path | None = None

    def __post_init__(self) -> None:
        taken = sorted({REAL, RECONSTRUCTED, WRONG_CAPTIONS} & set(self.generated))
        if taken:
            raise ConfigError(f"generated videos cannot be called {', '.join(taken)!r}: another arm has that name")


class Judgement(NamedTuple):
    """Result of a comparison: `report` is the content of scores.json, `page` the path of the page."""

    arms: list[ScoredVideos]
    report: dict[str, Any]
    page: Path


class _Source(NamedTuple):
    """An arm before it is read."""

    name: str
    captions: Sequence[str]
    clips: Iterator[ShapeClip]
    facts: Mapping[str, Any]


def judge_videos(request: Request, out: Path, progress: Progress = lambda stage, done, total: None) -> Judgement:
    """Read the videos of every available arm, and write scores.json and index.html into a folder.

    Args:
        request: inputs of the comparison; a missing one is reported, not refused.
        out: folder, created if needed; both files are replaced, each in one move.
        progress: called with (arm, videos read, total).

    Raises:
        DataError: a video or a dataset is damaged, or a caption does not say what its video shows.
        CheckpointError: the embedder cannot be loaded.
    """
    not_made: dict[str, str] = {}
    dataset = _open(request, not_made)
    codec = None if dataset is None else _codec(request, not_made)
    sources = [*_held_out(request, dataset, codec), *_generated(request, not_made)]
    shown, length = _choose(sources, request), None if codec is None else codec.num_frames
    arms = [
        read_arm(
            each.name, each.clips, each.facts, shown, partial(_tell, progress, each.name, len(each.captions)), length
        )
        for each in sources
    ]
    main = next((arm for arm in arms if arm.name == next(iter(request.generated), None)), None)
    arms += _chance(main or next(iter(arms), None), not_made)
    solvers = _solvers(request, not_made)
    report = _report(request, dataset, arms, main, not_made) | {"solvers": solvers}
    report["first_frames"] = _of_given(request, dataset, codec, arms, "image", judge_first_frames)
    report["continued"] = _of_given(request, dataset, codec, arms, "video", judge_continuations)
    report["missed"] += missed_first_frames(report["first_frames"]) + missed_continuations(report["continued"])
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / SCORES, report)
    return Judgement(arms, report, write_page(out, report, arms, shown, request.runs))


def _of_given(
    request: Request,
    dataset: Dataset | None,
    codec: ClipCodec | None,
    arms: Sequence[ScoredVideos],
    kind: str,
    judge: Callable[[Dataset, ClipCodec, Path, Sequence[str], ScoredVideos], dict[str, Any]],
) -> dict[str, Any]:
    """Judge the arms that were generated from given images, or given videos."""
    found: dict[str, Any] = {}
    by_name = {arm.name: arm for arm in arms}
    for name, folder in request.generated.items():
        names = generated_names(folder, request.number)
        if dataset is not None and codec is not None and name in by_name and is_given(folder, names, kind):
            found[name] = judge(dataset, codec, folder, names, by_name[name])
    return found


def _solvers(request: Request, not_made: dict[str, str]) -> dict[str, Any] | None:
    """Content of a record of `regen bench solvers`."""
    if request.solvers is None:
        return None
    if not request.solvers.is_file():
        not_made["solvers"] = f"there is nothing at {request.solvers}"
        return None
    return _facts(request.solvers)


def _tell(progress: Progress, name: str, total: int, done: int) -> None:
    progress(name, done, total)


def _open(request: Request, not_made: dict[str, str]) -> Dataset | None:
    url = request.held_out
    if url is None:
        not_made[REAL] = "no held-out dataset was given"
    elif _is_missing(url):
        not_made[REAL] = f"there is nothing at {url}"
    else:
        return open_dataset(url)
    not_made[RECONSTRUCTED] = "there are no real videos to reconstruct"
    return None


def _is_missing(url: str) -> bool:
    """Return whether this is a local folder that does not exist; object stores are only checked when they are read."""
    try:
        folder = parse_url(url).folder
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return folder is not None and not folder.exists()


def _held_out(request: Request, dataset: Dataset | None, codec: Codec | None) -> Iterator[_Source]:
    """Arms of the real videos and, where there is an embedder, of its reconstructions."""
    if dataset is None:
        return
    length = None if codec is None else codec.num_frames
    samples = held_out_samples(dataset, request.number)
    captions = [sample.caption or "" for sample in samples]
    facts: dict[str, Any] = {"dataset": dataset.store.url, "fingerprint": dataset.fingerprint}
    facts |= {"options": dataset.manifest.options}
    yield _Source(REAL, captions, held_out_clips(dataset, samples, length), facts)
    if codec is not None:
        clips = (reconstructed(clip, codec) for clip in held_out_clips(dataset, samples, length))
        yield _Source(RECONSTRUCTED, captions, clips, _codec_facts(request, codec))


def _codec(request: Request, not_made: dict[str, str]) -> Codec | None:
    if request.embedder is None:
        not_made[RECONSTRUCTED] = "no embedder was given"
    elif not request.embedder.exists():
        not_made[RECONSTRUCTED] = f"there is nothing at {request.embedder}"
    else:
        return Codec.load(request.embedder)
    return None


def _codec_facts(request: Request, codec: Codec) -> dict[str, Any]:
    origin = codec.config.origin
    return {
        "embedder": str(request.embedder),
        "config_hash": origin.config_hash if origin else _config_hash(request.embedder),
        "weights": codec.weights,
        "step": codec.step,
        "temporal_compression": codec.temporal_compression,
        "latent_channels": codec.latent_channels,
        "steps": 1,
    }


def _generated(request: Request, not_made: dict[str, str]) -> Iterator[_Source]:
    for name, folder in request.generated.items():
        names = generated_names(folder, request.number)
        if names:
            facts = {"folder": str(folder), **generated_facts(folder, names)}
            yield _Source(name, generated_prompts(folder, names), generated_clips(folder, names), facts)
        else:
            not_made[name] = f"there are no generated videos in {folder}"


def _choose(sources: Sequence[_Source], request: Request) -> list[str]:
    """Choose the captions that the page shows: spread over those of the arm that the targets apply to, or else over
    those of the first arm."""
    by_name = {source.name: source.captions for source in sources}
    captions = by_name.get(next(iter(request.generated), ""), sources[0].captions if sources else [])
    rows = choose_rows(len(captions), request.previews) if captions and request.previews else []
    return list(dict.fromkeys(captions[row] for row in rows))


def _chance(arm: ScoredVideos | None, not_made: dict[str, str]) -> list[ScoredVideos]:
    wrong = None if arm is None else with_wrong_captions(arm)
    if wrong is None:
        not_made[WRONG_CAPTIONS] = "captions cannot be exchanged among fewer than two videos"
        return []
    return [wrong]


def _report(
    request: Request,
    dataset: Dataset | None,
    arms: Sequence[ScoredVideos],
    main: ScoredVideos | None,
    not_made: Mapping[str, str],
) -> dict[str, Any]:
    """Content of scores.json."""
    seen = None
    if main is not None and dataset is not None:
        seen = seen_in_training([video.wanted for video in main.videos], dataset)
    return {
        "targets": TARGETS,
        "least_videos": LEAST_VIDEOS,
        "targets_are_for": None if main is None else main.name,
        "missed": ["there are no generated videos"] if main is None else missed_targets(main.scores),
        "combinations_not_held_out": seen,
        "not_made": dict(not_made),
        "runs": {name: {"folder": str(run), "config_hash": _config_hash(run)} for name, run in request.runs.items()},
        "machine": describe_machine(),
        "arms": {arm.name: arm.to_json() for arm in arms},
    }


def _config_hash(run: Path | None) -> str | None:
    path = None if run is None else run / "config.hash"
    return path.read_text(encoding="utf-8").strip() if path is not None and path.is_file() else None
