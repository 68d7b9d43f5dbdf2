"""Pixels as numbers: uint8 in files and datasets, float in [-1, 1] in models. The only place that converts them.

Legend: B clips, T frames, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

UInt8s = npt.NDArray[np.uint8]
_HALF_RANGE = 127.5  # uint8 0 … 255 is -1 … 1


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
