"""Windows of a long video: cutting it into overlapping clips, and the weight of each clip at a given time.

Frames are numbered from 0 and stand for bins of width one; a window of `n` frames that starts at frame `s` covers
the times `[s, s + n - 1]`. Two windows that share `m` frames are cross-faded by a linear ramp over these `m` bins:
with one shared frame each window counts one half there, with two the weights go 1/4, 3/4. With a `fade` the ramp is
wider than what they share: both windows are decoded past their ends (docs/reconstruct.md). The blending is our own
choice, not the paper's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regen_dist.errors import ConfigError
from regen_dist.inference.latent_space import only_raw
from regen_dist.models.encoder import Latents


@dataclass(frozen=True, eq=False)
class Window:
    """One encoded clip of a longer video: latents (B = 1), the frame of the video where it starts, its frames, and how
    many frames a cross-fade with a neighbour may reach past the middle (`blend_weights`).

    Raises:
        DataError: the latents are normalised ones.
    """

    latents: Latents
    start: float
    length: int
    fade: int = 0

    def __post_init__(self) -> None:
        only_raw(self.latents)


def plan_windows(num_frames_video: int, num_frames_clip: int, overlap: int = 1) -> list[int]:
    """First frame of each window, ascending, so that every frame of the video is in at least one window.

    Neighbours share `overlap` frames, except that the last window is moved back until it is full, and then shares
    more. A video that is not longer than a clip has one window (which the caller pads by repeating the last frame).

    Raises ConfigError when a count is not positive or `overlap` is not in `[0, num_frames_clip - 1]`.
    """
    if num_frames_video < 1 or num_frames_clip < 1:
        raise ConfigError(
            f"a video of {num_frames_video} frames cannot be cut into clips of {num_frames_clip} frames; "
            "both must be at least 1"
        )
    if not 0 <= overlap <= num_frames_clip - 1:
        raise ConfigError(
            f"overlap is {overlap}; clips of {num_frames_clip} frames can share 0 to {num_frames_clip - 1} of them"
        )
    if num_frames_video <= num_frames_clip:
        return [0]
    last = num_frames_video - num_frames_clip
    return [*range(0, last, num_frames_clip - overlap), last]


def blend_weights(starts: Sequence[float], num_frames: int, times: Tensor, *, fade: int = 0) -> Tensor:
    """Weight of every window at every time: `[num_windows, F]`, columns sum to 1, zero where a window does not reach.

    Args:
        starts: first frame of each window, ascending.
        num_frames: frames of each window.
        times: `[F]` real, in frames of the video. A time that no window covers (before the first, past the last, or
            in the gap between windows that share no frame) belongs to the nearest window, which extrapolates.
        fade: the ramp between two windows covers `2 fade + 1` frames at least. Where they share fewer, both
            extrapolate; 0 keeps to what they share.
    """
    dtype = times.dtype if times.dtype.is_floating_point else torch.float32
    at = times.to(dtype)[None, :]  # 1 F
    first = torch.as_tensor(list(starts), dtype=dtype, device=times.device)[:, None]  # W 1
    last = first + (num_frames - 1)
    shared = last[:-1] - first[1:] + 1  # W-1 1: frames that a window shares with the next one
    past = ((2 * fade + 1 - shared) / 2).clamp(min=0.0) if fade else torch.zeros_like(shared)  # decoded past an end
    none = past.new_zeros(1, 1)
    inside = (at >= first - torch.cat([none, past])) & (at <= last + torch.cat([past, none]))  # W F
    weights = torch.where(inside, _ramps(first, last, at, past), 0.0)
    distance = torch.maximum(first - at, at - last)  # W F, how far outside
    nearest = torch.nn.functional.one_hot(distance.argmin(dim=0), len(starts)).T.to(dtype)
    weights = torch.where(weights.sum(dim=0) > 0, weights, nearest)
    return weights / weights.sum(dim=0, keepdim=True)


def _ramps(first: Tensor, last: Tensor, at: Tensor, past: Tensor) -> Tensor:
    """Ramps `[W, F]`: rise over the frames shared with the previous window and `past` on both sides, then fall."""
    rise, fall = torch.ones_like(first + at), torch.ones_like(first + at)
    shared = last[:-1] - first[1:] + 1 + 2 * past  # W-1 1
    bins = shared.clamp(min=1.0)
    rise[1:] = ((at - first[1:] + past + 0.5) / bins).clamp(0.0, 1.0)
    fall[:-1] = ((last[:-1] - at + past + 0.5) / bins).clamp(0.0, 1.0)
    overlaps = shared > 0
    rise[1:] = torch.where(overlaps, rise[1:], 1.0)
    fall[:-1] = torch.where(overlaps, fall[:-1], 1.0)
    return torch.minimum(rise, fall)
