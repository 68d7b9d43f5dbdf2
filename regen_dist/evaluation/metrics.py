"""Quality of a reconstruction against its source: PSNR, SSIM, VMAF, the seam ratio, and the cost of the latents.

Everything is measured on 8-bit RGB frames, as displayed, and accumulated frame by frame.
"""

from __future__ import annotations

import json
import math
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from regen_dist.config.run import check_seed
from regen_dist.errors import BackendError, ConfigError, DataError, needing_extra
from regen_dist.evaluation.perceptual import frame_planes
from regen_dist.inference.frames import HIGHEST_FPS, ROUNDING_S, Frame, SourceVideo, VideoWriter
from regen_dist.inference.long_video import (
    DEFAULT_FADE,
    DEFAULT_GROUP,
    DecodePlan,
    Positions,
    Speed,
    VideoCodec,
    decode_stream,
    encode_groups,
    make_plan,
    output_positions,
)
from regen_dist.pixels import SSIM_WINDOW, ssim_terms

if TYPE_CHECKING:
    from regen_dist.evaluation.protocol import PinnedVideo

PEAK = 255.0
PSNR_CEILING = 100.0  # dB, the value for equal frames, so that means stay finite
LATENT_BITS = 16  # a latent value is counted as stored in 16 bits
RAW_BITS_PER_PIXEL = 24.0
VMAF_SIDE = 17  # pixels; libvmaf crashes on smaller pictures, measured


def psnr_db(mean_squared_error: float) -> float:
    """Peak signal-to-noise ratio in dB of an error in 8-bit units squared; at most `PSNR_CEILING`."""
    if mean_squared_error <= 0:
        return PSNR_CEILING
    return min(PSNR_CEILING, 10 * math.log10(PEAK**2 / mean_squared_error))


def squared_error(source: Frame, other: Frame) -> float:
    """Mean squared error of two frames, over pixels and colours."""
    difference = source.astype(np.float32) - other
    return float(np.mean(difference * difference, dtype=np.float64))


def ssim(source: Frame, other: Frame) -> float | None:
    """Structural similarity over the three colours, Gaussian window; None for frames smaller than the window."""
    if min(source.shape[:2]) < SSIM_WINDOW:
        return None
    luminance, contrast = ssim_terms(frame_planes(source), frame_planes(other))
    return float((luminance * contrast).mean())


@dataclass
class VideoMeter:
    """Accumulator of the measures of one video. Pass it the pairs of frames in order.

    Attributes:
        errors: mean squared error of each frame.
        similarities: SSIM of each frame that is large enough.
        changes, source_changes: mean absolute difference between each frame and the one before it.
    """

    errors: list[float] = field(default_factory=list)
    similarities: list[float] = field(default_factory=list)
    changes: list[float] = field(default_factory=list)
    source_changes: list[float] = field(default_factory=list)
    _last: tuple[Frame, Frame] | None = None

    def add(self, source: Frame, other: Frame) -> None:
        """Measure one more frame. Raises DataError when the sides differ."""
        if source.shape != other.shape:
            raise DataError(
                f"frames of {source.shape[:2]} and {other.shape[:2]} pixels cannot be compared; give videos of one size"
            )
        self.errors.append(squared_error(source, other))
        similarity = ssim(source, other)
        if similarity is not None:
            self.similarities.append(similarity)
        if self._last is not None:
            self.source_changes.append(frame_change(self._last[0], source))
            self.changes.append(frame_change(self._last[1], other))
        self._last = (source, other)

    @property
    def psnr_db(self) -> float:
        """PSNR of the mean squared error over the whole video, the figure to quote."""
        return psnr_db(float(np.mean(self.errors)))

    @property
    def psnr_mean_over_frames_db(self) -> float:
        """Mean of the frames' PSNR; never below `psnr_db`, and more favourable to videos of uneven quality."""
        return float(np.mean([psnr_db(error) for error in self.errors]))

    @property
    def ssim(self) -> float | None:
        """Mean over frames; None when the frames are too small for the window."""
        return float(np.mean(self.similarities)) if self.similarities else None


def frame_change(before: Frame, after: Frame) -> float:
    """Mean absolute difference of two frames, in 8-bit units."""
    return float(np.mean(np.abs(after.astype(np.int16) - before), dtype=np.float64))


def seam_ratio(changes: Sequence[float], crosses: Sequence[bool | None]) -> float | None:
    """Mean change between frames across clip borders over the mean change inside clips.

    Compare it with the same ratio of the source: a larger value means visible seams.

    Args:
        changes: mean absolute difference of frames t and t + 1.
        crosses: true where frames t and t + 1 come from different clips, or in different proportions; None where they
            are of different shots, a step that is left out.

    Returns:
        The ratio; None when all steps or none cross a border, or when nothing moves inside the clips.
    """
    values = np.array([change for change, across in zip(changes, crosses, strict=True) if across is not None])
    across = np.array([across for across in crosses if across is not None], dtype=bool)
    if across.all() or not across.any():
        return None
    inside = float(values[~across].mean())
    return float(values[across].mean()) / inside if inside > 0 else None


def bits_per_pixel(latent_values: int, num_frames: int, height: int, width: int) -> float:
    """Bits of latent for each pixel of the video, `LATENT_BITS` a value; an uncompressed video has 24."""
    return latent_values * LATENT_BITS / (num_frames * height * width)


@dataclass(frozen=True)
class Vmaf:
    """VMAF (0 to 100, mean over frames, model vmaf_v0.6.1), or the reason why it is missing."""

    score: float | None
    reason: str = ""


def vmaf(reference: Path, distorted: Path, *, executable: str | None = None) -> Vmaf:
    """Compare two video files of equal sides, frame by frame in order, with the libvmaf of imageio-ffmpeg's ffmpeg.

    Failures of ffmpeg never raise; they are the result's `reason`.
    """
    try:
        ffmpeg = executable or _ffmpeg()
    except (BackendError, RuntimeError) as error:
        return Vmaf(None, f"no ffmpeg: {error}")
    with tempfile.TemporaryDirectory() as folder:
        # Frames are paired by number: setpts takes the files' own timing out of it.
        pace, compare = "setpts=N/25/TB", "libvmaf=log_fmt=json:log_path=vmaf.json:n_threads=2"
        graph = f"[0:v]{pace}[d];[1:v]{pace}[r];[d][r]{compare}"
        inputs = ["-i", str(distorted.resolve()), "-i", str(reference.resolve())]
        command = [ffmpeg, "-v", "error", "-nostdin", *inputs, "-lavfi", graph, "-f", "null", "-"]
        try:
            run = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", check=False)
            if run.returncode:
                last_line = (run.stderr.strip().splitlines() or ["no output"])[-1]
                return Vmaf(None, f"ffmpeg ended with {run.returncode}: {last_line}")
            log = json.loads((Path(folder) / "vmaf.json").read_text())
            return Vmaf(float(log["pooled_metrics"]["vmaf"]["mean"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            return Vmaf(None, f"libvmaf gave no score: {error}")


def has_ffmpeg() -> bool:
    """Return whether there is an ffmpeg that `vmaf` can ask."""
    try:
        return bool(_ffmpeg())
    except (BackendError, RuntimeError):
        return False


def _ffmpeg() -> str:
    with needing_extra("VMAF"):
        import imageio_ffmpeg
    return str(imageio_ffmpeg.get_ffmpeg_exe())


# Roundtrip of a whole video through a codec, measured against its source on the way.


@dataclass(frozen=True)
class Options:
    """Options of a reconstruction. Steps below 1, a rate that is not above 0, or a seed that is no int64
    raise ConfigError.

    Attributes:
        steps: sampling steps of the decoder.
        fps: frames a second of the output; None keeps the source's own times.
        overlap: frames that neighbouring clips share.
        seed: seed of the decoder's noise.
        group: clips that are decoded together; bounds the memory.
        cuts: begin a new clip at each cut that is found, instead of encoding two shots as one clip.
        tile: side in pixels of the codec's tiles (`Codec.use_tiles`), for the record; None without tiles.
    """

    steps: int = 1
    fps: float | None = None
    overlap: int = 1
    seed: int = 0
    group: int = DEFAULT_GROUP
    cuts: bool = True
    tile: int | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps is {self.steps}; a decoder takes at least 1")
        if self.fps is not None and not 0 < self.fps <= HIGHEST_FPS:
            raise ConfigError(f"fps is {self.fps:g}; it must be above 0, and at most {HIGHEST_FPS}")
        check_seed(self.seed)

    def check(self, codec: VideoCodec) -> None:
        """Raise ConfigError where the options do not fit the codec."""
        if self.fps is not None and codec.kind == "magvit2":
            raise ConfigError(
                "the magvit2 baseline decodes the frames that it was given and none between them: leave fps out, "
                "or use a run with model.kind=regen"
            )


@dataclass(frozen=True)
class Pair:
    """One decoded frame and the source's frame that is on screen at its time; `seconds` from the start of the video."""

    index: int
    seconds: float
    source: Frame
    decoded: Frame


@dataclass
class Roundtrip:
    """One video on its way through a codec, cut into clips that do not cross `cuts`, the frames that begin a shot.

    `measured` yields a pair for every frame of the source. `on_output` is called with the pairs of the output: the
    same ones, or those at `options.fps`. After the last pair, `speed` and `plan` describe the work done.
    """

    source: SourceVideo | PinnedVideo
    codec: VideoCodec
    options: Options
    on_output: Callable[[Pair], None] = lambda pair: None
    cuts: Sequence[int] = ()
    speed: Speed = field(default_factory=Speed)

    def __post_init__(self) -> None:
        self.options.check(self.codec)
        frames, clip = self.source.num_frames, self.codec.num_frames
        fade = DEFAULT_FADE if self.codec.kind == "regen" else 0  # only REGEN can decode past a clip's ends
        overlap, group = self.options.overlap, self.options.group
        self.plan: DecodePlan = make_plan(frames, clip, overlap=overlap, group=group, fade=fade, cuts=self.cuts)
        self._source_frames: dict[int, Frame] = {}  # the source's frames that are still needed

    def measured(self) -> Iterator[Pair]:
        """Yield pairs at the source's own times."""
        own = output_positions(self.source.timestamps, None)
        other = None if self.options.fps is None else output_positions(self.source.timestamps, self.options.fps)
        counts = [0, 0]
        for done in self._decode([own] if other is None else [own, other]):
            for decoded in done[0]:
                index = counts[0]
                pair = Pair(index, float(self.source.timestamps[index]), self._source_frames[index], decoded)
                if other is None:
                    self.on_output(pair)
                yield pair
                counts[0] += 1
            for decoded in done[1] if other is not None else ():
                self.on_output(self._output_pair(counts[1], other, decoded))
                counts[1] += 1
            needed = min(counts[0], _next_source_frame(other, counts[1]))
            self._source_frames = {index: frame for index, frame in self._source_frames.items() if index >= needed}

    def _decode(self, tracks: list[Positions]) -> Iterator[list[list[Frame]]]:
        groups = encode_groups(self.codec, self._frames(), self.plan, self.speed)
        sides, options = (self.source.height, self.source.width), self.options
        return decode_stream(
            self.codec,
            groups,
            self.plan,
            tracks,
            sides=sides,
            steps=options.steps,
            seed=options.seed,
            speed=self.speed,
        )

    def _frames(self) -> Iterator[Frame]:
        for index, frame in enumerate(self.source.frames()):
            self._source_frames[index] = frame
            yield frame

    def _output_pair(self, index: int, positions: Positions | None, decoded: Frame) -> Pair:
        assert positions is not None
        assert self.options.fps is not None
        # The source frame that a player would show at this time, which may be rounded to just before it.
        slack = min(0.5, ROUNDING_S * float(self.source.rate))
        shown = min(int(positions[index] + slack), self.source.num_frames - 1)
        return Pair(index, index / self.options.fps, self._source_frames[shown], decoded)


def _next_source_frame(positions: Positions | None, count: int) -> int:
    """The first source frame that the output still needs."""
    if positions is None or count >= len(positions):
        return np.iinfo(np.int64).max
    return int(positions[count])


@dataclass(frozen=True)
class Measurement:
    """Measures of one video. A figure that is not available is None, and `notes` gives the reason."""

    psnr_db: float
    psnr_mean_over_frames_db: float
    ssim: float | None
    vmaf: float | None
    seam_ratio: float | None
    seam_ratio_source: float | None
    latent_bits_per_pixel: float
    compression: float
    windows: int
    encode_s: float
    decode_s: float
    encode_frames_per_s: float
    decode_frames_per_s: float
    notes: tuple[str, ...] = ()


def measure(
    roundtrip: Roundtrip,
    *,
    with_vmaf: bool = True,
    on_pair: Callable[[Pair], None] = lambda pair: None,
    meter: VideoMeter | None = None,
) -> Measurement:
    """Run a roundtrip to its end. VMAF compares lossless 4:2:0 copies in a temporary folder. A new `meter` passed by
    the caller holds the measures of each frame afterwards."""
    meter, source = VideoMeter() if meter is None else meter, roundtrip.source
    score = Vmaf(None, "not asked for")
    if with_vmaf and min(source.height, source.width) < VMAF_SIDE:
        score = Vmaf(None, f"it needs {VMAF_SIDE} pixels a side, found {source.height}x{source.width}")
        with_vmaf = False
    with tempfile.TemporaryDirectory() as folder:
        copies = [Path(folder) / name for name in ("source.mp4", "decoded.mp4")]
        remedy = "lossless copies for VMAF lie there: make room, or set TMPDIR to a folder with room"
        with ExitStack() as stack:
            writers = [
                stack.enter_context(VideoWriter(path, source.rate, crf=0, preset="ultrafast", remedy=remedy))
                for path in (copies if with_vmaf else ())
            ]
            for pair in roundtrip.measured():
                meter.add(pair.source, pair.decoded)
                on_pair(pair)
                for writer, frame in zip(writers, (pair.source, pair.decoded), strict=False):
                    writer.write(frame)
        score = vmaf(*copies) if with_vmaf else score
    return _summarise(roundtrip, meter, score)


def _summarise(roundtrip: Roundtrip, meter: VideoMeter, score: Vmaf) -> Measurement:
    source, speed, crosses = roundtrip.source, roundtrip.speed, roundtrip.plan.crosses()
    bits = bits_per_pixel(speed.latent_values, source.num_frames, source.height, source.width)
    seam = seam_ratio(meter.changes, crosses) if crosses else None
    notes = [f"VMAF: {score.reason}"] if score.score is None else []
    if meter.ssim is None:
        notes.append(f"SSIM: its window of {SSIM_WINDOW} pixels does not fit {source.height}x{source.width}")
    if seam is None:
        more = "all steps between frames, or none, lie between clips, or nothing moves"
        notes.append(f"seam ratio: {'the video is one clip' if len(roundtrip.plan.starts) == 1 else more}")
    return Measurement(
        psnr_db=meter.psnr_db,
        psnr_mean_over_frames_db=meter.psnr_mean_over_frames_db,
        ssim=meter.ssim,
        vmaf=score.score,
        seam_ratio=seam,
        seam_ratio_source=seam_ratio(meter.source_changes, crosses) if crosses else None,
        latent_bits_per_pixel=bits,
        compression=RAW_BITS_PER_PIXEL / bits,
        windows=len(roundtrip.plan.starts),
        encode_s=speed.encode_s,
        decode_s=speed.decode_s,
        encode_frames_per_s=source.num_frames / max(speed.encode_s, 1e-9),
        decode_frames_per_s=speed.frames_decoded / max(speed.decode_s, 1e-9),
        notes=tuple(notes),
    )
