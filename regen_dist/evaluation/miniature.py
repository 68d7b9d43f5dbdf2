"""Judgement of the miniature: every available kind of video is read by the same detector; scores.json and the page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from regen_dist.config.files import write_text_atomically
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
from regen_dist.evaluation.metrics import psnr_db, squared_error
from regen_dist.evaluation.miniature_scores import (
    ATTRIBUTES,
    LEAST_DIRECTION,
    LEAST_VIDEOS,
    MEASURES,
    NOTHING,
    REAL,
    RECONSTRUCTED,
    TARGETS,
    WRONG_CAPTIONS,
    ClipCodec,
    Confusion,
    ContinuationMeter,
    ScoredVideos,
    ShapeClip,
    generated_clips,
    generated_facts,
    generated_names,
    generated_prompts,
    given_kind,
    held_out_clips,
    held_out_samples,
    missed_continuations,
    missed_targets,
    read_arm,
    reconstructed,
    recorded_facts,
    seen_in_training,
    with_wrong_captions,
)
from regen_dist.evaluation.report import PAGE, Curve, draw_curves, page_environment, replace_file
from regen_dist.evaluation.shapes import Reading
from regen_dist.inference.codec import Codec
from regen_dist.jsontext import json_text
from regen_dist.observe.hardware import describe_machine
from regen_dist.observe.record import read_record

# Videos generated from a given first frame: the distance of their own first frame from it, compared with the
# embedder's reconstruction, and whether they still move as their captions say.

MOST_LOST_DB = 1.0  # target of frame 0 against its reconstruction


def is_given(folder: Path, names: Sequence[str], kind: str = "image") -> bool:
    """Return whether the records of all these videos say that they were generated from an image, or a video."""
    return bool(names) and all(given_kind(recorded_facts(folder / f"{name}.json")) == kind for name in names)


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
        made.append(psnr_db(squared_error(source.frames[0], clip.frames[0])))
        own.append(psnr_db(squared_error(source.frames[0], reconstructed(source, codec).frames[0])))
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
    arms = []
    for each in sources:
        report_read = partial(_report_read, progress, each)
        arms.append(read_arm(each.name, each.clips, each.facts, shown, report_read, length))
    main = next((arm for arm in arms if arm.name == next(iter(request.generated), None)), None)
    arms += _chance(main or next(iter(arms), None), not_made)
    solvers = _solvers(request, not_made)
    report = _report(request, dataset, arms, main, not_made) | {"solvers": solvers}
    report["first_frames"] = _of_given(request, dataset, codec, arms, "image", judge_first_frames)
    report["continued"] = _of_given(request, dataset, codec, arms, "video", judge_continuations)
    report["missed"] += missed_first_frames(report["first_frames"]) + missed_continuations(report["continued"])
    out.mkdir(parents=True, exist_ok=True)
    write_text_atomically(out / SCORES, json_text(report, indent=2) + "\n")
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
    return recorded_facts(request.solvers)


def _report_read(progress: Progress, source: _Source, done: int) -> None:
    progress(source.name, done, len(source.captions))


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


# Page of the miniature: one self-contained index.html, which can be sent and kept as it is.

_VALUES = {"colour": tuple(COLOURS), "shape": tuple(SHAPES), "direction": tuple(DIRECTIONS)}


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
            main=next((row for row in rows if row["main"]), None),
            gallery=[(caption, _videos(arms, caption)) for caption in captions],
            curves={name: found for name, run in runs.items() if (found := _curves(run))},
            grids={
                arm.name: [_grid(name, confusion) for name, confusion in arm.confusions.items()]
                for arm in arms
                if arm.name != WRONG_CAPTIONS
            },
            made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        )
    )
    replace_file(out / PAGE, lambda file: file.write_text(text, encoding="utf-8"))
    return out / PAGE


def _row(arm: ScoredVideos, report: Mapping[str, Any]) -> dict[str, Any]:
    """An arm in the table: its shares with their intervals, and whether they reach their targets (None: no target)."""
    main, scores, cells = arm.name == report["targets_are_for"], arm.scores, []
    for name in MEASURES:
        share = scores[name]
        low, high = (f"{100 * end:.0f}" for end in share.interval())
        met = share.value >= TARGETS[name] if main else None
        cells.append({"share": f"{share.value:.1%}", "low": low, "high": high, "met": met})
    return {"name": arm.name, "main": main, "number": len(arm.videos), "cells": cells}


def _videos(arms: Sequence[ScoredVideos], caption: str) -> list[dict[str, Any]]:
    """Video of each arm for a caption, with the words of its reading, each with whether it is right; arms without one
    are left out."""
    wanted = parse_caption(caption)
    return [
        {"arm": arm.name, "image": arm.previews[caption], "words": _words(reading, wanted)}
        for arm in arms
        if (reading := arm.reading_of(caption)) is not None and caption in arm.previews
    ]


def _words(reading: Reading, wanted: Attributes) -> list[tuple[str, bool]]:
    if reading == (None, None, None):
        return [(NOTHING, False)]
    read = {name: getattr(reading, name) for name in ATTRIBUTES}
    return [(word or f"no {name}", word == getattr(wanted, name)) for name, word in read.items()]


def _curves(run: Path) -> list[Curve]:
    record = run / "metrics.jsonl"
    return draw_curves(read_record(record)) if record.is_file() else []


def _grid(attribute: str, confusion: Confusion) -> dict[str, Any]:
    """Confusion table: rows of a wanted value and, for each column, count and share of the row."""
    columns, rows = (*_VALUES[attribute], NOTHING), []
    for wanted in _VALUES[attribute]:
        counts = confusion.get(wanted, {})
        total = max(1, sum(counts.values()))
        rows.append((wanted, [(counts.get(read, 0), counts.get(read, 0) / total) for read in columns]))
    return {"attribute": attribute, "columns": columns, "rows": rows}
