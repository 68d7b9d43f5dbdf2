"""Encoding and decoding of a video of any length, a few clips at a time.

The video is cut into overlapping windows (`plan_windows`), encoded and decoded in groups: in a group
the codec blends the denoised estimates of neighbours at every sampling step; between groups the finished frames are
cross-faded by the same weights. So memory depends on the size of a group alone, and clip borders do not show.

Positions are real numbers, in frames of the video: 2.5 lies halfway between frames 2 and 3.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from regen_dist.config.run import SPATIAL_COMPRESSION
from regen_dist.errors import ConfigError, DataError
from regen_dist.inference.codec import Codec, Shot, Window, plan_windows, shot_weights
from regen_dist.inference.frames import Frame, Seconds, num_frames_at, pad_sides
from regen_dist.models.encoder import Latents
from regen_dist.pixels import to_frames, to_video

Positions = npt.NDArray[np.float64]  # F, in frames of the video, increasing
DEFAULT_GROUP = 4
DEFAULT_FADE = 2  # measured: docs/reconstruct.md
_COMPLETE = 1.0 - 1e-4  # the sum of float32 weights at which a frame is finished


class VideoCodec(Protocol):
    """Interface of a codec: `regen_dist.inference.codec.Codec`, or any object with the same methods."""

    num_frames: int

    @property
    def kind(self) -> str:
        """Kind of the codec: `regen`, `magvit2`, or another name."""
        ...

    def encode(self, clips: Tensor) -> Latents:
        """Encode clips [B, 3, T, H, W] in [-1, 1], T of 1 or `num_frames`, to latents."""
        ...

    def decode_windows(self, windows: list[Window], times: Tensor, *, steps: int, seed: int, sample_id: int) -> Tensor:
        """Decode overlapping windows to frames [1, 3, F, H, W] in [-1, 1] at `times` [F]."""
        ...


@dataclass(frozen=True)
class DecodePlan:
    """Plan for cutting one video: `starts` of windows of `clip` frames (1 for an image), decoded `group` at a time and
    cross-faded over at least `2 fade + 1` frames. No window shows frames of two shots, which part at `cuts`."""

    num_frames: int
    clip: int
    starts: tuple[int, ...]
    group: int
    fade: int = 0
    cuts: tuple[int, ...] = ()  # numbers of the frames that begin another shot, increasing

    @property
    def groups(self) -> list[range]:
        """Window numbers of each group."""
        count = len(self.starts)
        return [range(first, min(first + self.group, count)) for first in range(0, count, self.group)]

    def shot(self, start: int) -> Shot:
        """The shot of the window that starts at this frame; the first and the last have no end."""
        place = bisect_right(self.cuts, start)
        return (
            self.cuts[place - 1] if place else -math.inf,
            self.cuts[place] if place < len(self.cuts) else math.inf,
        )

    def stop(self, start: int) -> int:
        """The first frame after the window that starts at this frame: past the clip, the shot or the video."""
        return int(min(start + self.clip, self.num_frames, self.shot(start)[1]))

    def crosses(self) -> list[bool | None]:
        """Flags, one for each frame but the last: whether the step to the next frame crosses from clip to clip, or
        touches a frame that two clips share; None for a step into another shot. A fade does not widen this: the same
        steps are measured for any blend."""
        steps: list[bool | None] = [False] * (self.num_frames - 1)
        for before, after in pairwise(self.starts):
            for frame in range(after - 1, min(self.stop(before), self.num_frames - 1)):
                steps[frame] = True
        for cut in self.cuts:
            steps[cut - 1] = None
        return steps

    def share(self, group: range, positions: Positions) -> Tensor:
        """Share of this group in the frames at `positions`: [F], 0 to 1; the groups' shares sum to 1."""
        first, last = self.starts[group[0]], self.starts[group[-1]]
        reach = 2 * (self.clip + self.fade + 1)
        near = range(bisect_left(self.starts, first - reach), bisect_right(self.starts, last + reach))
        starts = [self.starts[i] for i in near]
        shots = [self.shot(start) for start in starts]
        weights = shot_weights(starts, shots, self.clip, torch.from_numpy(positions), fade=self.fade)
        return weights[[i in group for i in near]].sum(dim=0).float()


def make_plan(
    num_frames_video: int,
    num_frames_clip: int,
    *,
    overlap: int = 1,
    group: int = DEFAULT_GROUP,
    fade: int = 0,
    cuts: Sequence[int] = (),
) -> DecodePlan:
    """Plan the windows of a video, of each shot by itself; ConfigError when the overlap or the group does not fit."""
    if group < 1:
        raise ConfigError(f"windows are decoded {group} at a time; it must be at least 1")
    starts = [
        first + start
        for first, stop in pairwise([0, *cuts, num_frames_video])
        for start in plan_windows(stop - first, num_frames_clip, overlap)
    ]
    clip = 1 if num_frames_video == 1 else num_frames_clip
    return DecodePlan(num_frames_video, clip, tuple(starts), group, fade, tuple(cuts))


def output_positions(timestamps: Seconds, fps: float | None) -> Positions:
    """Positions of the output's frames, in frames of the source.

    Args:
        timestamps: seconds of the source's frames [F], increasing; the rate may vary.
        fps: frames a second of the output; None means the source's own frames.

    Returns:
        Positions [N], from 0 to at most F - 1: nothing is extrapolated past the last frame.

    Raises:
        ConfigError: `fps` is not above 0, or not finite.
    """
    numbers = np.arange(len(timestamps), dtype=np.float64)
    if fps is None:
        return numbers
    if not 0 < fps < math.inf:
        raise ConfigError(f"fps is {fps:g}; it must be above 0, and finite")
    times = np.arange(num_frames_at(timestamps, fps)) / fps
    return np.interp(times, timestamps, numbers)


@dataclass
class Speed:
    """Seconds spent in the codec and what was done in them; frames shared by windows count once for each window."""

    encode_s: float = 0.0
    decode_s: float = 0.0
    frames_decoded: int = 0
    latent_values: int = 0


@dataclass
class _Track:
    """Series of positions to decode, and its frames that still wait for the next group."""

    positions: Positions
    pending: dict[int, Tensor] = field(default_factory=dict)  # index: weighted sum of frames [3, H, W]
    weight: dict[int, float] = field(default_factory=dict)
    num_done: int = 0

    def add(self, indices: npt.NDArray[np.int64], video: Tensor, shares: Tensor) -> None:
        """Add one group's frames [3, N, H, W], each with its share."""
        for place, (index, share) in enumerate(zip(indices.tolist(), shares.tolist(), strict=True)):
            frame = video[:, place] * share
            self.pending[index] = self.pending[index] + frame if index in self.pending else frame
            self.weight[index] = self.weight.get(index, 0.0) + share

    def finished(self, height: int, width: int) -> list[Frame]:
        """Take the frames, in order, that no later group adds to; cropped to the video's sides."""
        done = []
        while self.weight.get(self.num_done, 0.0) >= _COMPLETE:
            self.weight.pop(self.num_done)
            done.append(to_frames(self.pending.pop(self.num_done)[:, None, :height, :width])[0])
            self.num_done += 1
        return done


def encode_groups(codec: VideoCodec, frames: Iterable[Frame], plan: DecodePlan, speed: Speed) -> Iterator[list[Window]]:
    """Encode a video's frames, group by group. A shot shorter than a clip is padded with its last frame."""
    source = iter(frames)
    buffer: deque[Frame] = deque()
    first = 0  # number of the frame buffer[0]
    for group in plan.groups:
        start, stop = plan.starts[group[0]], plan.stop(plan.starts[group[-1]])
        for _ in range(min(start - first, len(buffer))):
            buffer.popleft()
        first = start
        buffer.extend(
            pad_sides(frame, getattr(codec, "cell", SPATIAL_COMPRESSION))
            for frame in islice(source, max(stop - first - len(buffer), 0))
        )
        if len(buffer) < stop - first:
            raise DataError(
                f"the video ends after frame {first + len(buffer) - 1}; {plan.num_frames} frames were announced"
            )
        starts = [plan.starts[i] for i in group]
        # Nothing here keeps the clips while the group is decoded.
        clips = (_clip(buffer, start - first, plan.stop(start) - first, plan.clip) for start in starts)
        yield _encode(codec, clips, starts, plan, speed)


def _clip(held: Iterable[Frame], start: int, stop: int, length: int) -> list[Frame]:
    """Clip of `length` frames: these of the held frames, padded with the last of them."""
    frames = list(islice(held, start, stop))
    return frames + [frames[-1]] * (length - len(frames))


def _encode(
    codec: VideoCodec, clips: Iterable[list[Frame]], starts: list[int], plan: DecodePlan, speed: Speed
) -> list[Window]:
    videos = torch.stack([to_video(clip) for clip in clips])  # W 3 T H W
    began = time.perf_counter()
    latents = codec.encode(videos)
    _wait_for_device()
    speed.encode_s += time.perf_counter() - began
    parts = latents if videos.shape[2] > 1 else latents[:1]  # an image has no motion latent to store
    speed.latent_values += sum(part.numel() for part in parts)
    return [
        Window(
            Latents(*(part[place : place + 1] for part in latents)),
            float(start),
            plan.clip,
            plan.fade,
            plan.shot(start),
        )
        for place, start in enumerate(starts)
    ]


def decode_stream(
    codec: VideoCodec,
    groups: Iterable[list[Window]],
    plan: DecodePlan,
    tracks: Sequence[Positions],
    *,
    sides: tuple[int, int],
    steps: int,
    seed: int = 0,
    sample_id: int = 0,
    speed: Speed | None = None,
) -> Iterator[list[list[Frame]]]:
    """Decode groups as they arrive; yield, for each group, the frames of every track that are now finished.

    Args:
        codec: decodes.
        groups: encoded windows, as `encode_groups` yields them.
        plan: the plan that the groups follow.
        tracks: series of positions to decode, each increasing; every series is decoded by itself.
        sides: (height, width) to crop to.
        steps: sampling steps.
        seed: seed of the noise.
        sample_id: key of the noise, which distinguishes two videos of one seed.
        speed: counters that the decoding time and the frames are added to.
    """
    speed = Speed() if speed is None else speed
    states = [_Track(positions) for positions in tracks]
    for numbers, windows in zip(plan.groups, groups, strict=True):
        for state in states:
            indices, shares = _indices(plan, numbers, state.positions)
            for phase in _phases(indices, state.positions):
                times = torch.from_numpy(state.positions[indices[phase]])
                began = time.perf_counter()
                video = codec.decode_windows(windows, times, steps=steps, seed=seed, sample_id=sample_id)[0]
                _wait_for_device()
                speed.decode_s += time.perf_counter() - began
                speed.frames_decoded += len(times)
                state.add(indices[phase], video.cpu(), shares[phase])
        yield [state.finished(*sides) for state in states]


def _indices(plan: DecodePlan, group: range, positions: Positions) -> tuple[npt.NDArray[np.int64], Tensor]:
    """Indices of the positions that a group has a share in, and the shares."""
    first, last = plan.starts[group[0]] - 1 - plan.fade, plan.starts[group[-1]] + plan.clip + plan.fade
    low, high = np.searchsorted(positions, [first, last], side="left")
    indices = np.arange(low, high)
    if not len(indices):
        return indices, torch.zeros(0)
    shares = plan.share(group, positions[indices])
    used = shares > 0
    return indices[used.numpy()], shares[used]


def _phases(indices: npt.NDArray[np.int64], positions: Positions) -> list[slice]:
    """Split dense positions into interleaved series about one frame apart, the spacing that a model is trained on.

    Times are then about as dense as in training, whatever the output's rate (our choice, not the paper's).
    """
    if not len(indices):
        return []
    span = positions[indices[-1]] - positions[indices[0]] + 1.0
    count = max(1, round(len(indices) / span))
    return [slice(phase, None, count) for phase in range(min(count, len(indices)))]


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# Decoding of rows of adjacent clips, as text to video generates them, at any times.
#
# Legend: B rows, n clips in a row, T = k + 1 frames of a clip, F requested frames, H x W pixels.


def row_frames(
    codec: VideoCodec,
    row: Sequence[Latents],
    positions: Positions,
    *,
    steps: int = 1,
    seed: int = 0,
    sample_id: int = 0,
) -> Iterator[list[Frame]]:
    """Yield the frames of one row in order as they are finished. Memory does not grow with the row's length.

    Args:
        codec: decodes.
        row: the latents of each clip, [1, C, h, w].
        positions: [F] real and ascending, in frames from the row's first; clip i begins at i * T.
        steps: sampling steps of the decoder.
        seed, sample_id: keys of the decoder's noise.
    """
    clip = codec.num_frames
    plan = make_plan(len(row) * clip, clip, overlap=0)
    windows = [Window(latents, float(number * clip), clip) for number, latents in enumerate(row)]
    groups = ([windows[number] for number in group] for group in plan.groups)
    height, width = (SPATIAL_COMPRESSION * side for side in row[0].content.shape[-2:])
    for (frames,) in decode_stream(
        codec, groups, plan, [positions], sides=(height, width), steps=steps, seed=seed, sample_id=sample_id
    ):
        yield frames


def decode_row(
    codec: Codec,
    row: Sequence[Latents],
    *,
    steps: int = 1,
    seed: int = 0,
    after_each: Callable[[], None] = lambda: None,
) -> Tensor:
    """Decode the whole rows of a batch at their own frames, [B, 3, n*T, H, W] in [-1, 1] on the CPU; images (one clip
    without motion) as [B, 3, 1, H, W]. `after_each` is called once for each of the B rows."""
    if len(row) == 1 and not bool((row[0].motion != 0).any()):
        images = codec.decode(row[0], torch.zeros(1), steps=steps, seed=seed).cpu()
        for _ in images:
            after_each()
        return images
    positions = np.arange(len(row) * codec.num_frames, dtype=np.float64)
    videos = []
    for number in range(len(row[0].content)):
        own = [Latents(*(part[number : number + 1] for part in latents)) for latents in row]
        parts = row_frames(codec, own, positions, steps=steps, seed=seed, sample_id=number)
        videos.append(to_video([frame for part in parts for frame in part]))
        after_each()
    return torch.stack(videos)
