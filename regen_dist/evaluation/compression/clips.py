"""The test clips: stretches of video listed by name and frame, or found in a folder by a rule.

A stretch lies within one shot, and is cut into as many whole clips of k + 1 frames as it has, whatever k is. It is read
at a scale and with a crop, so that the same picture can be had at the training resolution and at twice it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from regen_dist.config.loading import load_section
from regen_dist.config.section import Fraction, PositiveInt, Section
from regen_dist.data.video import reader as video
from regen_dist.data.video.scenes import Analysis, analyse, is_frozen, missed_cut, shots
from regen_dist.errors import DataError
from regen_dist.inference.frames import Frame

SUFFIXES = frozenset({".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v", ".y4m", ".mpg", ".mpeg", ".ts"})
LEAST_FRAMES, MOST_FRAMES = 33, 66  # one clip of k = 32, and two
MOST_STRETCHES = 4  # of one video
LOOKED_AT = 1500  # frames of a video in which shots are looked for
RULE = (
    f"every video of the folder, in order of name; its first {LOOKED_AT} frames are parted at scene changes; of each "
    f"shot of at least {LEAST_FRAMES} frames in which something moves, the middle {MOST_FRAMES} frames (or all); at "
    f"most {MOST_STRETCHES} of these, spread evenly; the centre of the picture"
)


class Stretch(Section):
    """Frames `first` to `first + frames - 1` of a video, its name in the folder of the videos; where the crop lies in
    the room there is."""

    video: str
    first: int = Field(ge=0)
    frames: PositiveInt
    crop_y: Fraction = 0.5
    crop_x: Fraction = 0.5

    @property
    def label(self) -> str:
        """For pictures and tables."""
        return f"{self.video}, frame {self.first}"


class ClipList(Section):
    """The committed file."""

    stretches: tuple[Stretch, ...] = Field(min_length=1)


@dataclass(frozen=True)
class TestSet:
    """Stretches of the videos in a folder, how they were chosen, and videos that gave none."""

    __test__ = False  # pytest: no class of tests

    folder: Path
    stretches: tuple[Stretch, ...]
    chosen: str
    left_out: tuple[str, ...] = ()

    def facts(self) -> dict[str, Any]:
        """Its part of the JSON. The folder is told by its name alone."""
        listed = [stretch.model_dump(mode="json") for stretch in self.stretches]
        return {"folder": self.folder.name, "chosen": self.chosen, "stretches": listed, "left_out": list(self.left_out)}


def load_clips(path: Path, folder: Path) -> TestSet:
    """The stretches that a file lists, of videos in `folder`.

    Raises:
        ConfigError: the file is not such a list.
        DataError: a video is missing.
    """
    stretches = load_section(ClipList, path).stretches
    missing = sorted({each.video for each in stretches if not (folder / each.video).is_file()})
    if missing:
        raise DataError(f"{folder} lacks {', '.join(missing)}, of which {path} lists clips: run `regen fetch-videos`")
    return TestSet(folder, stretches, f"listed in {path}")


def find_clips(folder: Path) -> TestSet:
    """Stretches of any videos, by `RULE`. Videos that cannot be read, or have no such shot, are left out and named.

    Raises:
        DataError: there is no such folder, or nothing in it serves.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; give one with videos to --tests")
    stretches: list[Stretch] = []
    left_out: list[str] = []
    for path in sorted(each for each in folder.rglob("*") if each.suffix.lower() in SUFFIXES):
        name = str(path.relative_to(folder))
        try:
            found = list(_stretches_of(path, name))
        except (DataError, OSError) as error:
            left_out.append(f"{name}: {error}")
            continue
        stretches += found
        if not found:
            left_out.append(f"{name}: no shot of {LEAST_FRAMES} frames in which something moves")
    if not stretches:
        raise DataError(f"no video in {folder} serves as a test; {'; '.join(left_out) or 'there are none'}")
    return TestSet(folder, tuple(stretches), RULE, tuple(left_out))


def _stretches_of(path: Path, name: str) -> Iterator[Stretch]:
    """By the rule."""
    with video.VideoReader(path) as reader:
        number = min(len(reader.table.pts), LOOKED_AT)
        seen = analyse(frame for _, frame in reader.frames(range(number)))
    good = [shot for shot in shots(seen.cuts, 0, number) if _serves(seen, *shot)]
    for place in range(min(MOST_STRETCHES, len(good))):
        start, stop = good[place * len(good) // min(MOST_STRETCHES, len(good))]
        frames = min(MOST_FRAMES, stop - start)
        yield Stretch(video=name, first=start + (stop - start - frames) // 2, frames=frames)


def _serves(seen: Analysis, start: int, stop: int) -> bool:
    if stop - start < LEAST_FRAMES or missed_cut(seen.change, start, stop):
        return False
    return not is_frozen(seen.change, start, stop)


def read_stretch(folder: Path, stretch: Stretch, size: tuple[int, int], short_side: int) -> Frame:
    """The frames of a stretch, uint8 [T, H, W, 3].

    Args:
        folder: of the videos.
        stretch: which frames, and where in the picture.
        size: (height, width) of the crop.
        short_side: that whole frames are resized to before; enlarged further only if the crop would not fit.

    Raises:
        DataError: the video cannot be read, or has fewer frames.
    """
    path = folder / stretch.video
    try:
        with video.VideoReader(path) as reader:
            shape = reader.info()
            place = stretch.crop_y, stretch.crop_x
            geometry = video.fit_geometry(shape.height, shape.width, size, short_side, *map(_below_one, place))
            numbers = range(stretch.first, stretch.first + stretch.frames)
            return np.ascontiguousarray(video.read_clip(reader, numbers, geometry).transpose(1, 2, 3, 0))
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _below_one(place: float) -> float:
    """The far edge is 1 in the list, and just below it where places are drawn."""
    return min(place, 1 - 1e-9)


def cut(frames: Frame, length: int, stride: int = 1) -> Sequence[Frame]:
    """Whole clips of `length` frames, `stride` apart, one after the other: [length, H, W, 3] each."""
    span = (length - 1) * stride + 1
    return [frames[start : start + span : stride] for start in range(0, len(frames) - span + 1, span)]
