"""Measurements of `regen bench compression`: test clips, features, Fréchet distance and quality.

A test stretch lies within one shot and is cut into whole clips of k + 1 frames for any k. It is read at a scale and
with a crop, so that the same view is available at the training resolution and at twice that.
"""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from regen_dist.checkpoint.export import find_checkpoint, open_run
from regen_dist.config import EmbedderConfig, config_hash
from regen_dist.config.files import load_section, write_text_atomically
from regen_dist.config.run import SPATIAL_COMPRESSION, Fraction, PositiveInt, Section
from regen_dist.data.video.conversion import fit_geometry
from regen_dist.data.video.reader import VideoReader, read_clip
from regen_dist.data.video.scenes import analyse, is_frozen, missed_cut, shots
from regen_dist.errors import ConfigError, DataError
from regen_dist.evaluation.metrics import VideoMeter, Vmaf, psnr_db, squared_error, vmaf
from regen_dist.evaluation.perceptual import GivenNetwork, frechet_distance, load_features, segments
from regen_dist.inference.codec import Codec
from regen_dist.inference.frames import Frame, write_video
from regen_dist.jsontext import json_text
from regen_dist.pixels import SSIM_WINDOW, to_frames, to_videos

SUFFIXES = frozenset({".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v", ".y4m", ".mpg", ".mpeg", ".ts"})
LEAST_FRAMES, MOST_FRAMES = 33, 66  # one clip of k = 32, and two
MOST_STRETCHES = 4  # of one video
LOOKED_AT = 1500  # frames of a video that are searched for shots
_BELOW_1 = 1 - 1e-9  # position of the far edge, which is 1 in the list
RULE = (
    f"every video of the folder, in order of name; its first {LOOKED_AT} frames are parted at scene changes; of each "
    f"shot of at least {LEAST_FRAMES} frames in which something moves, the middle {MOST_FRAMES} frames (or all); at "
    f"most {MOST_STRETCHES} of these, spread evenly; the centre of the picture"
)


class ClipSpan(Section):
    """Frames `first` to `first + frames - 1` of a video, given by name; and the relative position of the crop."""

    video: str = Field(description="File name of the video.")
    first: int = Field(ge=0, description="First frame, counted from 0.")
    frames: PositiveInt = Field(description="Number of frames.")
    crop_y: Fraction = Field(default=0.5, description="Vertical position of the crop: 0 is the top, 1 the bottom.")
    crop_x: Fraction = Field(default=0.5, description="Horizontal position of the crop: 0 is the left, 1 the right.")

    @property
    def label(self) -> str:
        """Label in pictures and tables."""
        return f"{self.video}, frame {self.first}"


class ClipList(Section):
    """Schema of the committed list file."""

    stretches: tuple[ClipSpan, ...] = Field(min_length=1, description="Test clips, each a stretch of a video.")


@dataclass(frozen=True)
class TestSet:
    """Stretches of the videos in a folder, the rule by which they were chosen, and videos without any."""

    __test__ = False  # pytest: no class of tests

    folder: Path
    stretches: tuple[ClipSpan, ...]
    chosen: str
    left_out: tuple[str, ...] = ()

    def facts(self) -> dict[str, Any]:
        """Return its part of the JSON. Of the folder, only the name is included."""
        listed = [stretch.model_dump(mode="json") for stretch in self.stretches]
        return {"folder": self.folder.name, "chosen": self.chosen, "stretches": listed, "left_out": list(self.left_out)}


def load_clips(path: Path, folder: Path) -> TestSet:
    """Return the stretches listed in a file, of videos in `folder`.

    Raises:
        ConfigError: the file is not a valid list.
        DataError: a video is missing.
    """
    stretches = load_section(ClipList, path).stretches
    missing = sorted({each.video for each in stretches if not (folder / each.video).is_file()})
    if missing:
        raise DataError(f"{folder} lacks {', '.join(missing)}, of which {path} lists clips: run `regen fetch-videos`")
    return TestSet(folder, stretches, f"listed in {path}")


def find_clips(folder: Path) -> TestSet:
    """Find stretches of any videos by `RULE`. Unreadable videos and those without a suitable shot are listed and
    skipped.

    Raises:
        DataError: the folder does not exist or contains no suitable video.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; give one with videos to --tests")
    stretches: list[ClipSpan] = []
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


def _stretches_of(path: Path, name: str) -> Iterator[ClipSpan]:
    """Yield the stretches of a video by the rule."""
    with VideoReader(path) as reader:
        number = min(len(reader.table.pts), LOOKED_AT)
        seen = analyse(frame for _, frame in reader.frames(range(number)))
    good = [
        (start, stop)
        for start, stop in shots(seen.cuts, 0, number)
        if stop - start >= LEAST_FRAMES
        and not missed_cut(seen.change, start, stop)
        and not is_frozen(seen.change, start, stop)
    ]
    for place in range(min(MOST_STRETCHES, len(good))):
        start, stop = good[place * len(good) // min(MOST_STRETCHES, len(good))]
        frames = min(MOST_FRAMES, stop - start)
        yield ClipSpan(video=name, first=start + (stop - start - frames) // 2, frames=frames)


def read_stretch(folder: Path, stretch: ClipSpan, size: tuple[int, int], short_side: int) -> Frame:
    """Read the frames of a stretch, uint8 [T, H, W, 3].

    Args:
        folder: folder of the videos.
        stretch: frames and position of the crop.
        size: (height, width) of the crop.
        short_side: size to which whole frames are resized first; enlarged only if the crop would not fit.

    Raises:
        DataError: the video is unreadable or has fewer frames.
    """
    path = folder / stretch.video
    try:
        with VideoReader(path) as reader:
            shape = reader.info()
            place = (min(each, _BELOW_1) for each in (stretch.crop_y, stretch.crop_x))
            geometry = fit_geometry(shape.height, shape.width, size, short_side, *place)
            numbers = range(stretch.first, stretch.first + stretch.frames)
            return np.ascontiguousarray(read_clip(reader, numbers, geometry).transpose(1, 2, 3, 0))
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def cut(frames: Frame, length: int, stride: int = 1) -> Sequence[Frame]:
    """Cut whole clips of `length` frames, `stride` apart: [length, H, W, 3] each."""
    span = (length - 1) * stride + 1
    return [frames[start : start + span : stride] for start in range(0, len(frames) - span + 1, span)]


# Features of short videos, by a network that the user gives.

NAME = "Fréchet video distance"
SEGMENT_FRAMES = 16  # of the segments that have features, unless the network takes another number
NOT_GIVEN = "not measured, for no network was given (--fvd FILE; docs/evaluate.md names some)"


@functools.cache
def _network(path: Path) -> GivenNetwork:
    """Read once in a process."""
    return load_features(path, video=True)


def features_of(videos: Iterable[Frame], fvd: Path | None) -> Tensor | None:
    """Features [N, D] of all whole segments of videos uint8 [T, H, W, 3]; None where no network is given.

    Raises:
        ConfigError, DataError: as `load_features`.
    """
    if fvd is None:
        return None
    network = _network(fvd)
    length = network.segment_frames or SEGMENT_FRAMES
    parts = [network.call(segments(list(video), length)) for video in videos if len(video) >= length]
    return torch.cat(parts) if parts else torch.empty(0, 1)


# Quality of decoded stretches against their sources: PSNR, SSIM, VMAF, and a distance of features.

_RATE = 25  # of the copies that VMAF reads; it plays no part


class Decoded(NamedTuple):
    """A stretch and what was made of it, uint8 [T, H, W, 3] each."""

    source: Frame
    made: Frame


def quality(stretches: Sequence[Decoded], features: Tensor | None = None, fvd: Path | None = None) -> dict[str, Any]:
    """The measures of stretches of one size. Where one cannot be had it is None, and `notes` says why.

    `psnr_db` is the mean over stretches of the PSNR of each one's mean squared error; `psnr_pooled_db` uses the error
    over all of them; SSIM is the mean over frames; VMAF is of all stretches in sequence.

    Args:
        stretches: decoded and source frames of stretches of one size.
        features: features of the sources, if `features_of` has made them already.
        fvd: the user's network of video, for the Fréchet distance.

    Raises:
        DataError: there are no stretches.
    """
    if not stretches:
        raise DataError("there is no decoded stretch to measure")
    meters = [_metered(each) for each in stretches]
    errors = [error for meter in meters for error in meter.errors]
    similarities = [value for meter in meters for value in meter.similarities]
    score, (distance, why) = _vmaf(stretches), _distance(stretches, features, fvd)
    notes = [f"VMAF: {score.reason}"] if score.score is None else []
    if not similarities:
        notes.append(f"SSIM: its window of {SSIM_WINDOW} pixels does not fit {stretches[0].source.shape[1:3]}")
    return {
        "psnr_db": fmean(meter.psnr_db for meter in meters),
        "psnr_pooled_db": psnr_db(fmean(errors)),
        "psnr_of_stretches_db": [meter.psnr_db for meter in meters],
        "ssim": fmean(similarities) if similarities else None,
        "vmaf": score.score,
        "frechet": distance,
        "frames": len(errors),
        "notes": [*notes, *([f"{NAME}: {why}"] if why else [])],
    }


def mean_psnr_db(stretches: Iterable[Decoded]) -> float:
    """Compute only the `psnr_db` of `quality`."""
    return fmean(psnr_db(squared_error(*each)) for each in stretches)


def _metered(stretch: Decoded) -> VideoMeter:
    meter = VideoMeter()
    for source, made in zip(stretch.source, stretch.made, strict=True):
        meter.add(source, made)
    return meter


def _vmaf(stretches: Sequence[Decoded]) -> Vmaf:
    with tempfile.TemporaryDirectory() as folder:
        copies = [Path(folder) / f"{name}.mp4" for name in Decoded._fields]
        for number, path in enumerate(copies):
            write_video(path, (frame for stretch in stretches for frame in stretch[number]), _RATE, crf=0)
        return vmaf(*copies)


def _distance(stretches: Sequence[Decoded], features: Tensor | None, fvd: Path | None) -> tuple[float | None, str]:
    """The distance, or None and why."""
    source = features_of((each.source for each in stretches), fvd) if features is None else features
    made = features_of((each.made for each in stretches), fvd)
    if source is None or made is None:
        return None, NOT_GIVEN
    try:
        return frechet_distance(source, made), ""
    except DataError as error:
        return None, str(error)


# Measurement of a trained arm on the test clips: three sizes, more steps, and times between given frames.

TRAINED, DOUBLE, OTHER = "training", "double", "other aspect"
_VERSION = 2  # of what is measured: measures of another are made again
_SHOWN = 2  # stretches whose decoded frames are kept for the page


class CropSize(NamedTuple):
    """A crop (height, width) of frames that were resized to a short side, in pixels."""

    crop: tuple[int, int]
    short_side: int


def sizes_of(config: EmbedderConfig) -> dict[str, CropSize]:
    """Return the test sizes: the training crop; the same view at twice the resolution; a crop of about the same area at
    the training scale with about 2.25 times its aspect ratio.

    Raises:
        ConfigError: the config does not define the scale at which it trains.
    """
    side, (height, width) = config.data.short_side, config.data.size
    if not isinstance(side, int):
        raise ConfigError(f"data.short_side is {side}; this needs the short side of the whole frame, in pixels")
    low = max(1, round(height / 1.5 / SPATIAL_COMPRESSION)) * SPATIAL_COMPRESSION
    wide = max(1, round(height * width / low / SPATIAL_COMPRESSION)) * SPATIAL_COMPRESSION
    return {
        TRAINED: CropSize((height, width), side),
        DOUBLE: CropSize((2 * height, 2 * width), 2 * side),
        OTHER: CropSize((low, wide), side),
    }


def measure_arm(
    run: Path,
    tests: TestSet,
    sizes: Mapping[str, CropSize],
    kept: Path,
    steps: Sequence[int],
    *,
    fvd: Path | None = None,
    fresh: bool = False,
    threads: int | None = None,
) -> dict[str, Any]:
    """Measure an arm. Results are cached in a file and reused while weights and clips are the same.

    Args:
        run: folder of the arm's run.
        tests: the test clips.
        sizes: sizes at which the clips are read.
        kept: the file; beside it, with the ending `.npz`, decoded frames of the first and the last stretch.
        steps: sampling steps, 1 among them.
        fvd: the user's network of video, for the Fréchet distance; None: it is not measured.
        fresh: measure even so.
        threads: threads of this process, if it is one of several.

    Raises:
        CheckpointError: there is no good checkpoint.
        DataError: a clip is unreadable.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    key = _key(run, tests, sizes, steps, fvd)
    if not fresh and (found := _kept(kept, key)):
        return found
    codec, measures, frames = Codec.load(run), dict[str, Any](), dict[str, Frame]()
    for name, size in sizes.items():
        sources = [read_stretch(tests.folder, each, size.crop, size.short_side) for each in tests.stretches]
        decoded = {number: _decoded(codec, sources, number) for number in steps}
        features = features_of((each.source for each in decoded[1]), fvd)
        measures[name] = {str(number): quality(found, features, fvd) for number, found in decoded.items()}
        frames |= _shown(name, tests.stretches, decoded[1])
        if name == TRAINED:
            measures["between"] = between(codec, sources)
    kept.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(kept.with_suffix(".npz"), **frames)  # type: ignore[arg-type]
    write_text_atomically(kept, json_text({"key": key, "step": codec.step, "measures": measures}, indent=1) + "\n")
    return measures


def _key(
    run: Path, tests: TestSet, sizes: Mapping[str, CropSize], steps: Sequence[int], fvd: Path | None = None
) -> str:
    """Return one hash of all that the measures depend on: the config, the bytes of the weights, the clips."""
    config, folder = open_run(run)
    manifest = find_checkpoint(folder, checksums=False)
    parts = [_VERSION, config_hash(config), manifest.step, sorted(str(each) for each in manifest.files.values())]
    parts += [
        [str(tests.folder.resolve()), tests.facts()],
        {name: str(size) for name, size in sizes.items()},
        list(steps),
        None if fvd is None else _network(fvd).name,
    ]
    return hashlib.sha256(json_text(parts).encode()).hexdigest()


def _kept(path: Path, key: str) -> dict[str, Any] | None:
    if not path.is_file() or not path.with_suffix(".npz").is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found["measures"] if found["key"] == key else None


def _decoded(codec: Codec, sources: Sequence[Frame], steps: int) -> list[Decoded]:
    """Pass every stretch through the codec, cut into clips; those shorter than a clip are skipped."""
    found, number = [], 0
    for source in sources:
        clips = cut(source, codec.num_frames)
        if clips:
            whole = np.concatenate(clips)
            made = _made(codec, to_videos(clips), torch.arange(codec.num_frames), steps, number)
            found.append(Decoded(whole, made))
        number += len(clips)
    return found


def _made(codec: Codec, clips: Tensor, times: Tensor, steps: int, number: int) -> Frame:
    """Return decoded frames at `times` of each clip in sequence. `number` is the index of the first clip, for the
    noise."""
    ids = range(number, number + len(clips))
    videos = codec.decode(codec.encode(clips), times, steps=steps, sample_ids=ids)
    return np.concatenate([to_frames(each) for each in videos])


def between(codec: Codec, sources: Sequence[Frame]) -> dict[str, Any]:
    """Compute the PSNR in dB of held-out frames: every second one of 2k + 1 frames is encoded; one decoder step.

    `decoded` decodes at the times in between; `decoded_then_blended` decodes the given frames and averages the
    neighbours, which is all that the baseline can do; `blended` averages the source's own neighbours, which a decoder
    does not have. If no stretch is long enough, `clips` is 0 and the other entries are absent.
    """
    k, ways = codec.temporal_compression, dict[str, list[Decoded]]()
    for number, source in enumerate(sources):
        for clip in cut(source, 2 * k + 1):
            for way, made in _between(codec, clip, number).items():
                ways.setdefault(way, []).append(Decoded(clip[1::2], made))
    count = len(ways.get("blended", ()))
    return {"clips": count, **{f"{way}_db": mean_psnr_db(found) for way, found in ways.items()}}


def _between(codec: Codec, clip: Frame, number: int) -> dict[str, Frame]:
    """Return the odd frames of a clip of 2k + 1 frames, by each method."""
    given, whole = to_videos([clip[::2]]), torch.arange(codec.num_frames)
    ways = {"decoded_then_blended": _blended(_made(codec, given, whole, 1, number)), "blended": _blended(clip[::2])}
    if codec.kind == "regen":
        ways["decoded"] = _made(codec, given, whole[:-1] + 0.5, 1, number)
    return ways


def _blended(frames: Frame) -> Frame:
    """Return the mean of each frame and the next."""
    mean = (frames[:-1].astype(np.uint16) + frames[1:] + 1) // 2
    return mean.astype(np.uint8)


def _shown(size: str, stretches: Sequence[ClipSpan], decoded: Sequence[Decoded]) -> dict[str, Frame]:
    """Return the first and the last stretch for the page: source and decoded frames."""
    if len(decoded) != len(stretches):
        return {}
    places = sorted({0, len(stretches) - 1})[:_SHOWN]
    return {f"{size}/{place}/{part}": getattr(decoded[place], part) for place in places for part in Decoded._fields}
