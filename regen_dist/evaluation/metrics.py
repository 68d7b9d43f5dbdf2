"""How close a reconstruction is to its source: PSNR, SSIM, VMAF, the seam ratio, and what the latents cost.

Everything is taken on 8-bit RGB frames, as they are shown, and accumulated frame by frame.
"""

from __future__ import annotations

import json
import math
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import imageio_ffmpeg
import numpy as np

from regen_dist.errors import DataError
from regen_dist.inference.frames import Frame

PEAK = 255.0
PSNR_CEILING = 100.0  # dB, what equal frames count as, so that means stay finite
SSIM_WINDOW = 11  # pixels: the Gaussian window of Wang et al. 2004, sigma 1.5
LATENT_BITS = 16  # a latent value is counted as stored in 16 bits
RAW_BITS_PER_PIXEL = 24.0


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
    from skimage.metrics import structural_similarity  # here: training measures no SSIM, and scipy costs its start

    images = source.astype(np.float32), other.astype(np.float32)
    gaussian = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    similarity = structural_similarity(*images, data_range=PEAK, channel_axis=2, **gaussian)  # type: ignore[no-untyped-call]
    return float(similarity)


@dataclass
class Meter:
    """Accumulates the measures of one video. Feed it the pairs of frames in order.

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
            raise DataError(f"frames of {source.shape[:2]} and {other.shape[:2]} pixels cannot be compared")
        self.errors.append(squared_error(source, other))
        similarity = ssim(source, other)
        if similarity is not None:
            self.similarities.append(similarity)
        if self._last is not None:
            self.source_changes.append(_change(self._last[0], source))
            self.changes.append(_change(self._last[1], other))
        self._last = (source, other)

    @property
    def psnr_db(self) -> float:
        """PSNR of the mean squared error over the whole video: the figure to quote."""
        return psnr_db(float(np.mean(self.errors)))

    @property
    def psnr_mean_over_frames_db(self) -> float:
        """Mean of the frames' PSNR; never below the other, and kinder to videos of uneven quality."""
        return float(np.mean([psnr_db(error) for error in self.errors]))

    @property
    def ssim(self) -> float | None:
        """Mean over frames; None when the frames are too small for the window."""
        return float(np.mean(self.similarities)) if self.similarities else None


def _change(before: Frame, after: Frame) -> float:
    return float(np.mean(np.abs(after.astype(np.int16) - before), dtype=np.float64))


def seam_ratio(changes: Sequence[float], crosses: Sequence[bool]) -> float | None:
    """Mean change between frames across clip borders over the mean change inside clips.

    Compare it with the same ratio of the source: what is above that is a seam.

    Args:
        changes: mean absolute difference of frames t and t + 1.
        crosses: whether frames t and t + 1 come from different clips, or in different proportions.

    Returns:
        The ratio; None when all steps or none cross a border, or when nothing moves inside the clips.
    """
    values, across = np.asarray(changes, dtype=np.float64), np.asarray(crosses, dtype=bool)
    if across.all() or not across.any():
        return None
    inside = float(values[~across].mean())
    return float(values[across].mean()) / inside if inside > 0 else None


def bits_per_pixel(latent_values: int, num_frames: int, height: int, width: int) -> float:
    """Bits of latent for each pixel of the video, `LATENT_BITS` a value; an uncompressed video has 24."""
    return latent_values * LATENT_BITS / (num_frames * height * width)


@dataclass(frozen=True)
class Vmaf:
    """VMAF (0 to 100, mean over frames, model vmaf_v0.6.1), or why there is none."""

    score: float | None
    reason: str = ""


def vmaf(reference: Path, distorted: Path, *, executable: str | None = None) -> Vmaf:
    """Compare two video files of equal sides, frame by frame in order, with the libvmaf of imageio-ffmpeg's ffmpeg.

    Never raises for what ffmpeg does: a failure is the result's `reason`.
    """
    try:
        ffmpeg = executable or imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
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
                return Vmaf(None, f"ffmpeg ended with {run.returncode}: {_last_line(run.stderr)}")
            log = json.loads((Path(folder) / "vmaf.json").read_text())
            return Vmaf(float(log["pooled_metrics"]["vmaf"]["mean"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            return Vmaf(None, f"libvmaf gave no score: {error}")


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
