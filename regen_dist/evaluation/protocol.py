"""The protocol of an evaluation: which frames of which videos, at which size, in which colours, and its hash.

Two people who print the same protocol hash and the same hash of the source frames have measured on the same pixels in
the same way. A list file pins videos and frames by name; without one, every video of a folder is taken.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from regen_dist.config.files import load_section
from regen_dist.config.run import SEED_END, PositiveInt, Section
from regen_dist.data.build.sources import VIDEO_SUFFIXES as BUILT_SUFFIXES
from regen_dist.errors import ConfigError, DataError
from regen_dist.inference.frames import Frame, Seconds, SourceVideo
from regen_dist.jsontext import json_text

VIDEO_SUFFIXES = BUILT_SUFFIXES | {".y4m"}  # whatever `regen shards build` takes, and raw video
VERSION = 1  # version of the measures: raising it changes every protocol hash
# Facts that no option changes. Part of the hash, and printed.
FIXED = {
    "version": VERSION,
    "values": "decoded values are clamped to [-1, 1] and rounded to 8 bits; every measure is of 8-bit RGB frames",
    "colour": "RGB by the file's matrix and range tags; BT.601, limited range, where it has none",
    "resize": "bicubic with antialiasing (swscale, accurate rounding, full chroma), to the short side, before the crop",
    "crop": "the centre",
    "means": "each measure is one number a video; the table has the mean over videos",
}


class ListedVideo(Section):
    """A video of a list."""

    video: str = Field(
        min_length=1, description="File name of the video without its ending, or a pattern that fits one file."
    )
    first: int = Field(default=0, ge=0, description="First measured frame, counted from 0.")
    frames: PositiveInt | None = Field(
        default=None, description="Measured frames; null: as many as the protocol takes."
    )


class Protocol(Section):
    """Selection and preparation of the measured frames."""

    name: str = Field(default="folder", description="Name for readers; not part of the hash.")
    short_side: PositiveInt | None = Field(
        default=None, description="Pixels that the shorter side is resized to; null: not resized."
    )
    crop: tuple[PositiveInt, PositiveInt] | None = Field(
        default=None, description="(height, width) in pixels, cut from the centre after the resize; null: whole frames."
    )
    frames: PositiveInt | None = Field(
        default=None,
        description="Largest number of frames of each video; null: all. A listed video must have this many.",
    )
    period: int = Field(
        default=8,
        ge=2,
        description="Side in pixels of the cells at whose borders `grid_energy` is measured (8: the latent cells).",
    )
    segment_frames: int = Field(
        default=16, ge=2, description="Frames of the segments whose features the Fréchet video distance compares."
    )
    steps: PositiveInt = Field(default=1, description="Sampling steps of decoding.")
    overlap: int = Field(default=1, ge=0, description="Frames that neighbouring clips share in decoding.")
    seed: int = Field(default=0, ge=-SEED_END, lt=SEED_END, description="Seed of the decoder's noise.")
    videos: tuple[ListedVideo, ...] = Field(
        default=(), description="Videos that are measured; empty: every video of the folder in order of name."
    )

    @model_validator(mode="after")
    def _each_video_once(self) -> Protocol:
        names = [each.video for each in self.videos]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"videos are listed twice: {', '.join(twice)}; keep each once")
        return self

    def facts(self) -> dict[str, Any]:
        return {**self.model_dump(mode="json"), "fixed": FIXED}

    @property
    def hash(self) -> str:
        """Sixteen hex digits of the SHA-256 of `facts` without the name."""
        facts = {key: value for key, value in self.facts().items() if key != "name"}
        return hashlib.sha256(json_text(facts, sort_keys=True).encode()).hexdigest()[:16]


def load_protocol(path: Path | None, **changes: Any) -> Protocol:
    """Load the protocol of a list file, or the default one for a folder without a list.

    Args:
        path: YAML file; None without a list.
        changes: values that replace those of the file; None keeps a value.

    Raises:
        ConfigError: the file, or a change, is not valid.
    """
    given = {key: value for key, value in changes.items() if value is not None}
    base = Protocol() if path is None else load_section(Protocol, path)
    try:
        return Protocol.model_validate({**base.model_dump(), **given})
    except ValueError as error:
        raise ConfigError(f"the protocol is not valid: {error}") from error


class PinnedVideo:
    """The frames of one video that a protocol takes, resized and cropped; streamed, any number of times.

    Args:
        path: the file.
        protocol: sizes and number of frames.
        listed: its entry in the list; None where the folder has no list.

    Raises:
        DataError: the file is no video, has fewer frames than the list asks for, or is smaller than the crop.
    """

    def __init__(self, path: Path, protocol: Protocol, listed: ListedVideo | None = None) -> None:
        self.path, self._first = path, listed.first if listed else 0
        wanted = (listed.frames if listed else None) or protocol.frames
        last = None if wanted is None else self._first + wanted
        self._source = SourceVideo(path, short_side=protocol.short_side, max_frames=last)
        found = self._source.num_frames - self._first
        if found < 1 or (listed is not None and wanted is not None and found < wanted):
            raise DataError(
                f"{path} has {self._source.num_frames} frames, and the list asks for frames {self._first} to "
                f"{self._first + (wanted or 1) - 1}: it is another version of the video, or damaged"
            )
        whole = self._source.height, self._source.width
        self.height, self.width = protocol.crop or whole
        if self.height > whole[0] or self.width > whole[1]:
            raise DataError(
                f"{path}: the crop of {self.height}x{self.width} does not fit frames of {whole[0]}x{whole[1]}; take a "
                "smaller --crop or a larger --short-side"
            )
        self._top, self._left = (whole[0] - self.height) // 2, (whole[1] - self.width) // 2

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def num_frames(self) -> int:
        return self._source.num_frames - self._first

    @property
    def timestamps(self) -> Seconds:
        """Seconds from the first selected frame, float64 [F]."""
        own: Seconds = self._source.timestamps[self._first :] - self._source.timestamps[self._first]
        return own

    @property
    def rate(self) -> Fraction:
        """Average frames a second of the file."""
        return self._source.rate

    @property
    def notes(self) -> tuple[str, ...]:
        """Differences from the frames in the file (`SourceVideo.notes`)."""
        return tuple(self._source.notes)

    def frames(self) -> Iterator[Frame]:
        """Yield every frame in order, uint8 [height, width, 3]. Raises DataError at the first damaged frame."""
        rows, columns = slice(self._top, self._top + self.height), slice(self._left, self._left + self.width)
        for frame in islice(self._source.frames(), self._first, None):
            yield np.ascontiguousarray(frame[rows, columns])

    def sha256(self) -> str:
        """SHA-256 in hex of the pixels of all frames and their sides."""
        digest = hashlib.sha256(f"{self.num_frames} {self.height} {self.width}".encode())
        for frame in self.frames():
            digest.update(frame.tobytes())
        return digest.hexdigest()


def find_videos(folder: Path, protocol: Protocol, out: Path | None = None) -> list[PinnedVideo]:
    """Find the videos of a protocol, in the order of the list or of their names.

    Args:
        folder: folder of the videos, searched with its subfolders; or one video file, where the protocol has no list.
        protocol: the protocol, with or without a list.

    Raises:
        DataError: there is no such folder, no video in it, or a listed one is missing or found twice; two videos have
            one name, or a name is not UTF-8; a video cannot be read.
    """
    if folder.is_file() and not protocol.videos:
        return _each_name_once([PinnedVideo(folder, protocol)])
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder with videos; give the folder that holds them")
    files = sorted(path for path in folder.rglob("*") if _is_source(path, out))
    if not protocol.videos:
        if not files:
            raise DataError(
                f"{folder} has no video: none of its files ends in {', '.join(sorted(VIDEO_SUFFIXES))}"
                "; give a folder that has one"
            )
        return _each_name_once([PinnedVideo(path, protocol) for path in files])
    problems, chosen = [], []
    for listed in protocol.videos:
        fits = [path for path in files if path.match(listed.video) or path.with_suffix("").match(listed.video)]
        if len(fits) != 1:
            found = f"fits {len(fits)} files ({', '.join(path.name for path in fits[:3])})" if fits else "is missing"
            problems.append(f"{listed.video} {found}")
        else:
            chosen.append((fits[0], listed))
    if problems:
        raise DataError(f"{folder} is not the data of {protocol.name}: {'; '.join(problems)}. See docs/evaluate.md")
    return _each_name_once([PinnedVideo(path, protocol, listed) for path, listed in chosen])


def _is_source(path: Path, out: Path | None) -> bool:
    """Return whether a file is a video, neither hidden (as macOS leaves them) nor of an earlier evaluation in `out`."""
    if path.suffix.lower() not in VIDEO_SUFFIXES or path.name.startswith(".") or not path.is_file():
        return False
    return out is None or out.resolve() not in path.resolve().parents


def _each_name_once(videos: list[PinnedVideo]) -> list[PinnedVideo]:
    names = [video.name for video in videos]
    odd = [name for name in names if name.encode(errors="ignore").decode() != name]
    if odd:
        raise DataError(f"the name of {odd[0]!a} is not UTF-8; rename it, as the page and the JSON name videos")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"several videos are called {', '.join(twice)}; rename them: the page identifies them by name")
    return videos
