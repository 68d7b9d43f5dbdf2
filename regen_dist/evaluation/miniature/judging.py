"""The job of `regen score-shapes`: reads every arm there is, and writes scores.json and the page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from regen_dist.config.urls import parse_url
from regen_dist.data.dataset.catalogue import Dataset, open_dataset
from regen_dist.data.inspection.contact import choose_rows
from regen_dist.data.pool import Progress
from regen_dist.errors import ConfigError
from regen_dist.evaluation.miniature.arms import (
    REAL,
    RECONSTRUCTED,
    WRONG_CAPTIONS,
    Arm,
    read_arm,
    with_wrong_captions,
)
from regen_dist.evaluation.miniature.clips import (
    ShapeClip,
    generated_clips,
    generated_facts,
    generated_names,
    generated_prompts,
    held_out_clips,
    held_out_samples,
    reconstructed,
    seen_in_training,
)
from regen_dist.evaluation.miniature.page import write_page
from regen_dist.evaluation.miniature.scores import LEAST_VIDEOS, TARGETS, missed
from regen_dist.evaluation.reconstruction import write_json
from regen_dist.inference.codec import Codec
from regen_dist.observe.hardware import describe_machine

SCORES = "scores.json"


@dataclass(frozen=True)
class Request:
    """What is compared.

    Args:
        held_out: URL of the held-out dataset: the real videos.
        embedder: a run or an exported model; makes the reconstructions of the held-out videos.
        generated: name to a folder of `regen generate`; the first is the one that the targets are for.
        runs: name to a run folder, for the curves.
        number: most videos of an arm.
        previews: videos of each arm on the page.
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
    """What came of it: `report` is what is in scores.json, `page` where the page is."""

    arms: list[Arm]
    report: dict[str, Any]
    page: Path


class _Source(NamedTuple):
    """An arm that is still to be read."""

    name: str
    captions: Sequence[str]
    clips: Iterator[ShapeClip]
    facts: Mapping[str, Any]


def judge(request: Request, out: Path, progress: Progress = lambda stage, done, total: None) -> Judgement:
    """Read the videos of every arm that there is, and write scores.json and index.html into a folder.

    Args:
        request: what is compared; what is not there is told, not refused.
        out: folder, made if need be; both files are replaced, each in one move.
        progress: called with (arm, videos read, of how many).

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
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / SCORES, report)
    return Judgement(arms, report, write_page(out, report, arms, shown, request.runs))


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
    """Whether it is a local folder that is not there; buckets are asked when they are read."""
    try:
        folder = parse_url(url).folder
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return folder is not None and not folder.exists()


def _held_out(request: Request, dataset: Dataset | None, not_made: dict[str, str]) -> Iterator[_Source]:
    """Real videos and, where there is an embedder, what it makes of them."""
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
    """Captions that the page shows: spread over those of the videos that the targets are for, else over the first
    arm's."""
    by_name = {source.name: source.captions for source in sources}
    captions = by_name.get(next(iter(request.generated), ""), sources[0].captions if sources else [])
    rows = choose_rows(len(captions), request.previews) if captions and request.previews else []
    return list(dict.fromkeys(captions[row] for row in rows))


def _chance(arm: Arm | None, not_made: dict[str, str]) -> list[Arm]:
    wrong = None if arm is None else with_wrong_captions(arm)
    if wrong is None:
        not_made[WRONG_CAPTIONS] = "captions cannot be exchanged among fewer than two videos"
        return []
    return [wrong]


def _report(
    request: Request, dataset: Dataset | None, arms: Sequence[Arm], main: Arm | None, not_made: Mapping[str, str]
) -> dict[str, Any]:
    """What is in scores.json."""
    seen = None
    if main is not None and dataset is not None:
        seen = seen_in_training([video.wanted for video in main.videos], dataset)
    return {
        "targets": TARGETS,
        "least_videos": LEAST_VIDEOS,
        "targets_are_for": None if main is None else main.name,
        "missed": ["there are no generated videos"] if main is None else missed(main.scores),
        "combinations_not_held_out": seen,
        "not_made": dict(not_made),
        "runs": {name: {"folder": str(run), "config_hash": _config_hash(run)} for name, run in request.runs.items()},
        "machine": describe_machine(),
        "arms": {arm.name: arm.to_json() for arm in arms},
    }


def _config_hash(run: Path | None) -> str | None:
    path = None if run is None else run / "config.hash"
    return path.read_text(encoding="utf-8").strip() if path is not None and path.is_file() else None
