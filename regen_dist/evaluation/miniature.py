"""Judgement of the miniature: every available kind of video is read by the same detector; scores.json and the page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from regen_dist.config.urls import parse_url
from regen_dist.data.format.catalogue import Dataset, open_dataset
from regen_dist.data.inspect.contact import choose_rows
from regen_dist.data.pool import Progress
from regen_dist.data.synthetic.shapes import (
    COLOURS,
    DIRECTIONS,
    SHAPES,
    Attributes,
    parse_caption,
)
from regen_dist.errors import ConfigError, DataError
from regen_dist.evaluation.miniature_scores import (
    ATTRIBUTES,
    LEAST_VIDEOS,
    MEASURES,
    NOTHING,
    REAL,
    RECONSTRUCTED,
    TARGETS,
    WRONG_CAPTIONS,
    ClipCodec,
    Confusion,
    ScoredVideos,
    ShapeClip,
    UInt8s,
    generated_clips,
    generated_facts,
    generated_names,
    generated_prompts,
    held_out_clips,
    held_out_samples,
    missed_targets,
    read_arm,
    reconstructed,
    seen_in_training,
    with_wrong_captions,
)
from regen_dist.evaluation.reconstruct import write_json
from regen_dist.evaluation.report import PAGE, Curve, draw_curves, page_environment, replace_file
from regen_dist.evaluation.shapes import Reading
from regen_dist.inference.codec import Codec
from regen_dist.observe.hardware import describe_machine
from regen_dist.observe.record import read_record

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

MOST_LOST_DB, LEAST_DIRECTION = 1.0, 0.85  # targets: frame 0 against its reconstruction, and motion


def is_given(folder: Path, names: Sequence[str]) -> bool:
    """Return whether the records of all these videos say that they were generated from an image."""
    records = [json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in names]
    return bool(records) and all((record.get("given") or {}).get("kind") == "image" for record in records)


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
    numbers = [int(name.split("-")[0]) for name in names]
    samples = held_out_samples(dataset, max(numbers) + 1)
    sources = held_out_clips(dataset, [samples[number] for number in numbers], codec.num_frames)
    made, own = [], []
    for name, clip, source in zip(names, generated_clips(folder, names), sources, strict=True):
        if " ".join(source.caption.split()) != clip.caption:
            raise DataError(
                f"{folder / name}.json: its prompt is {clip.caption!r}, the held-out video of that number shows "
                f"{source.caption!r}; make the prompts and first frames again with `regen shards captions`"
            )
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
    """

    held_out: str | None = None
    embedder: Path | None = None
    generated: Mapping[str, Path] = field(default_factory=dict)
    runs: Mapping[str, Path] = field(default_factory=dict)
    number: int = LEAST_VIDEOS
    previews: int = 12

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
    sources = [*_held_out(request, dataset, not_made), *_generated(request, not_made)]
    shown = _choose(sources, request)
    arms = [
        read_arm(each.name, each.clips, each.facts, shown, partial(_tell, progress, each.name, len(each.captions)))
        for each in sources
    ]
    main = next((arm for arm in arms if arm.name == next(iter(request.generated), None)), None)
    arms += _chance(main or next(iter(arms), None), not_made)
    report = _report(request, dataset, arms, main, not_made)
    report["first_frames"] = _first_frames(request, dataset, arms)
    report["missed"] += missed_first_frames(report["first_frames"])
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / SCORES, report)
    return Judgement(arms, report, write_page(out, report, arms, shown, request.runs))


def _first_frames(request: Request, dataset: Dataset | None, arms: Sequence[ScoredVideos]) -> dict[str, Any]:
    """Judge the first frames of the arms that were generated from given images."""
    found = {}
    by_name = {arm.name: arm for arm in arms}
    for name, folder in request.generated.items():
        names = generated_names(folder, request.number)
        if dataset is not None and name in by_name and is_given(folder, names) and request.embedder is not None:
            codec = Codec.load(request.embedder)
            found[name] = judge_first_frames(dataset, codec, folder, names, by_name[name])
    return found


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


def _held_out(request: Request, dataset: Dataset | None, not_made: dict[str, str]) -> Iterator[_Source]:
    """Arms of the real videos and, where there is an embedder, of its reconstructions."""
    if dataset is None:
        return
    codec = _codec(request, not_made)
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
