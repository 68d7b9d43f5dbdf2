"""What a build will make, before it makes anything: sources, segments and shards as a pure function of files and
options."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from regen_dist.data.index import SCHEMA_VERSION
from regen_dist.data.manifest import Skip
from regen_dist.data.transcode import PRESET, X264_PARAMS, EncodeOptions, Probed, Segment
from regen_dist.data.video import VideoInfo
from regen_dist.errors import DataError

VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts"})
_SEGMENTS_PER_TASK = 8  # neighbours are decoded in one pass: fewer would decode lead-ins twice


@dataclass(frozen=True)
class BuildOptions:
    """Options of `regen shards build`. Times in seconds, sides in pixels; `keep` stores whole files as they are."""

    segment_seconds: float = 4.0
    short_side: int | None = 128
    crf: int = 18
    keep: bool = False
    samples_per_shard: int = 64
    min_frames: int = 33
    start_seconds: float = 0.0
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        limits = {
            "segment_seconds": self.segment_seconds,
            "samples_per_shard": self.samples_per_shard,
            "min_frames": self.min_frames,
        }
        wrong = [f"--{name.replace('_', '-')} {value}: must be above 0" for name, value in limits.items() if value <= 0]
        if self.short_side is not None and self.short_side < 16:
            wrong.append(f"--short-side {self.short_side}: must be at least 16")
        if not 0 <= self.crf <= 51:
            wrong.append(f"--crf {self.crf}: must be 0 (best) to 51")
        if self.start_seconds < 0 or (self.max_seconds is not None and self.max_seconds <= 0):
            wrong.append("--start-seconds must not be negative, --max-seconds must be above 0")
        if wrong:
            raise DataError("; ".join(wrong))

    @property
    def encode(self) -> EncodeOptions:
        """The part that a worker needs."""
        return EncodeOptions(self.short_side, self.crf, self.keep)


@dataclass(frozen=True)
class SourceFile:
    """A file to build from. `name` is how the dataset calls it: its path inside the folder that was given."""

    path: Path
    name: str


@dataclass(frozen=True)
class Task:
    """Neighbouring segments of one source: what one worker does at a time."""

    source: SourceFile
    caption: str | None
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class BuildPlan:
    """All tasks in order, what is left out from the start, and the identity by which a later build knows its own
    folder."""

    tasks: tuple[Task, ...]
    skipped: tuple[Skip, ...]
    encode: EncodeOptions
    identity: dict[str, Any]


def find_sources(paths: Sequence[Path]) -> list[SourceFile]:
    """Files as given, and all videos below the folders given, each once; DataError when a path is missing or
    nothing is found."""
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        raise DataError(f"no such file or folder: {', '.join(missing)}")
    found: dict[Path, SourceFile] = {}
    for root in paths:
        for path in _videos_below(root):
            found.setdefault(
                path.resolve(), SourceFile(path, path.name if root.is_file() else path.relative_to(root).as_posix())
            )
    if not found:
        raise DataError(f"no videos ({', '.join(sorted(VIDEO_SUFFIXES))}) in {', '.join(map(str, paths))}")
    return list(found.values())


def make_plan(
    sources: Sequence[SourceFile],
    probed: Sequence[Probed],
    options: BuildOptions,
    captions: dict[str, str] | None = None,
) -> BuildPlan:
    """Cut the sources into segments, and the segments into shards; DataError when captions were given and none
    belongs to a source."""
    captions = captions or {}
    skipped = _unused(captions, sources)
    tasks: list[Task] = []
    seen: dict[str, str] = {}
    for source, probe in zip(sources, probed, strict=True):
        problem = probe.problem or (f"same content as {seen[probe.content]}" if probe.content in seen else "")
        if problem or probe.info is None:
            skipped.append(Skip(source=source.name, reason=problem))
            continue
        seen[probe.content] = source.name
        segments, short = _segments(source, probe.content, probe.info, options)
        skipped += short
        caption = captions.get(source.name, captions.get(Path(source.name).name))
        tasks += [Task(source, caption, (segment,)) for segment in segments]
    return BuildPlan(
        tuple(_joined(tasks)), tuple(skipped), options.encode, _identity(sources, probed, options, captions)
    )


def read_captions(path: Path) -> dict[str, str]:
    """Captions by video name, from CSV or JSONL with the columns `video` and `caption`; DataError when a row lacks
    one."""
    text = path.read_text(encoding="utf-8")
    try:
        rows: Iterable[Any]
        if path.suffix == ".csv":
            rows = list(csv.DictReader(text.splitlines()))
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            raise DataError(f"{path}: captions come as .csv or .jsonl, with the columns video and caption")
        return {str(row["video"]): str(row["caption"]) for row in rows}
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: every row needs a video (its path inside SOURCE, or its file name) and a caption: {error}"
        ) from error


def _unused(captions: dict[str, str], sources: Sequence[SourceFile]) -> list[Skip]:
    names = {source.name for source in sources} | {Path(source.name).name for source in sources}
    unused = [name for name in captions if name not in names]
    if captions and len(unused) == len(captions):
        raise DataError(
            f"no caption belongs to a video: captions name {unused[:3]}, the videos are {sorted(names)[:3]}"
        )
    return [Skip(source=name, reason="a caption without a video") for name in unused]


def _videos_below(root: Path) -> list[Path]:
    if root.is_file():
        return [root]
    folders = (Path(folder) / name for folder, _, names in os.walk(root) for name in names if not name.startswith("."))
    return sorted(path for path in folders if path.suffix.lower() in VIDEO_SUFFIXES)


def _segments(
    source: SourceFile, content: str, info: VideoInfo, options: BuildOptions
) -> tuple[list[Segment], list[Skip]]:
    """The segments of a source that are long enough, and those that are not."""
    length = info.frames if options.keep else max(1, round(options.segment_seconds * info.fps))
    first = 0 if options.keep else min(info.frames, round(options.start_seconds * info.fps))
    last = info.frames
    if options.max_seconds is not None and not options.keep:
        last = min(last, first + round(options.max_seconds * info.fps))
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(source.name).stem)[:48] or "video"
    kept, short = [], []
    for number, start in enumerate(range(first, last, length)):
        stop = min(start + length, last)
        if stop - start < options.min_frames:
            reason = f"{stop - start} frames, fewer than --min-frames {options.min_frames}"
            short.append(Skip(source=source.name, segment=number, reason=reason))
        else:
            kept.append(Segment(f"{stem}-{content[:8]}-{start:08d}-{stop:08d}", number, start, stop))
    if not kept and not short:
        short.append(Skip(source=source.name, reason=f"it ends before --start-seconds {options.start_seconds}"))
    return kept, short


def _joined(tasks: Sequence[Task]) -> list[Task]:
    """Tasks of one segment each, put together where neighbours have the same source."""
    joined: list[Task] = []
    for task in tasks:
        if joined and joined[-1].source == task.source and len(joined[-1].segments) < _SEGMENTS_PER_TASK:
            joined[-1] = Task(task.source, task.caption, joined[-1].segments + task.segments)
        else:
            joined.append(task)
    return joined


def _identity(
    sources: Sequence[SourceFile], probed: Sequence[Probed], options: BuildOptions, captions: dict[str, str]
) -> dict[str, Any]:
    encoder = {"codec": "libx264", "preset": PRESET, "x264_params": X264_PARAMS}
    return {
        "schema_version": SCHEMA_VERSION,
        "options": asdict(options) | ({} if options.keep else encoder),
        "sources": {source.name: probe.content or "unreadable" for source, probe in zip(sources, probed, strict=True)},
        "captions": hashlib.sha256(json.dumps(captions, sort_keys=True).encode()).hexdigest() if captions else None,
    }
