"""Pixels as numbers: uint8 in files and datasets, float in [-1, 1] in models, the only place that converts them; and
their structural similarity (SSIM), which is measured and can be trained on.

Legend: B clips, T frames, H x W pixels, N planes, h x w places of the window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

UInt8s = npt.NDArray[np.uint8]
_HALF_RANGE = 127.5  # uint8 0 … 255 is -1 … 1
SSIM_WINDOW, _SIGMA = 11, 1.5  # pixels (Wang et al., 2004)


def to_float(pixels: Tensor) -> Tensor:
    """uint8 of any shape to new float32 values in [-1, 1], on the same device."""
    return pixels.float().div_(_HALF_RANGE).sub_(1.0)


def to_uint8(values: Tensor) -> Tensor:
    """Float values of any shape to the nearest uint8; what lies outside [-1, 1] is clamped."""
    return ((values.float() + 1.0) * _HALF_RANGE).round().clamp(0, 255).to(torch.uint8)


def to_video(frames: Sequence[UInt8s]) -> Tensor:
    """uint8 RGB frames [H, W, 3] to one float video [3, T, H, W] in [-1, 1]."""
    return to_float(torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2))


def to_videos(clips: Sequence[UInt8s]) -> Tensor:
    """uint8 RGB clips [T, H, W, 3] of one size to a float batch [B, 3, T, H, W] in [-1, 1]."""
    return to_float(torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3))


def to_frames(video: Tensor) -> UInt8s:
    """A float video [3, T, H, W] in [-1, 1] to uint8 RGB frames [T, H, W, 3]."""
    frames: UInt8s = to_uint8(video).permute(1, 2, 3, 0).cpu().numpy()
    return frames


def ssim_terms(x: Tensor, y: Tensor, data_range: float = 255.0) -> tuple[Tensor, Tensor]:
    """Return the two factors of SSIM (Wang et al., 2004) at every position where their Gaussian window fits whole:
    luminance, and contrast with structure, each [N, 1, h, w].

    Args:
        x, y: planes [N, 1, H, W].
        data_range: highest value less the lowest that a pixel can have.
    """
    weights = [math.exp(-((at - SSIM_WINDOW // 2) ** 2) / (2 * _SIGMA**2)) for at in range(SSIM_WINDOW)]
    window = [weight / sum(weights) for weight in weights]
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2

    def blur(image: Tensor) -> Tensor:
        # A sum of shifted planes. A convolution on a GPU may round to TF32's 10 bits, of which the variances below,
        # differences of nearly equal numbers, leave nothing where a frame is smooth; on a CPU it is slower.
        for axis in (2, 3):
            size = image.shape[axis] - SSIM_WINDOW + 1
            blurred = image.narrow(axis, 0, size) * window[0]
            for at in range(1, SSIM_WINDOW):
                blurred = torch.add(blurred, image.narrow(axis, at, size), alpha=window[at])
            image = blurred
        return image

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return luminance, (2 * covariance + c2) / (var_x + var_y + c2)


def clip_ssim(source: Tensor, made: Tensor) -> Tensor:
    """Return each clip's mean SSIM over frames and colours, [B], of clips [B, 3, T, H, W] in [-1, 1]."""
    x, y = ((video.float().reshape(-1, 1, *video.shape[3:]) + 1) / 2 for video in (source, made))
    luminance, contrast = ssim_terms(x, y, data_range=1.0)
    return (luminance * contrast).reshape(len(source), -1).mean(1)
