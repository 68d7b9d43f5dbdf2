"""Videos of several clips: how visible the seams between clips are, and how well a given first clip is continued.

Legend: T frames, H x W pixels; a clip is the k + 1 frames that the embedder encodes together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from regen_dist.evaluation.metrics import frame_change, psnr_db, seam_ratio, squared_error

UInt8s = npt.NDArray[np.uint8]

LEAST_DIRECTION = 0.85  # target: videos that go on from an image or a clip and still move as their captions say


@dataclass
class SeamMeter:
    """Accumulator of the changes between frames, over all videos of an arm. Videos of one clip have no seam.

    Args:
        clip_frames: frames of a clip.
    """

    clip_frames: int
    videos: int = 0
    _changes: list[float] = field(default_factory=list)
    _crosses: list[bool] = field(default_factory=list)

    def add(self, frames: UInt8s) -> None:
        """Measure a video, uint8 [T, H, W, 3], whose clips begin at multiples of `clip_frames`."""
        if len(frames) <= self.clip_frames:
            return
        self.videos += 1
        for number in range(1, len(frames)):
            self._changes.append(frame_change(frames[number - 1], frames[number]))
            self._crosses.append(number % self.clip_frames == 0)

    def to_json(self) -> dict[str, Any] | None:
        """The seam ratio over all videos, with the mean changes at and between the seams; None without a seam."""
        ratio = seam_ratio(self._changes, self._crosses) if self._changes else None
        if ratio is None:
            return None
        changes, crosses = np.array(self._changes), np.array(self._crosses)
        return {
            "videos": self.videos,
            "seam_ratio": ratio,
            "change_at_seams": float(changes[crosses].mean()),
            "change_inside": float(changes[~crosses].mean()),
        }


@dataclass
class ContinuationMeter:
    """Accumulator of the distance of continued videos from the videos that they continue. A shape on a straight line
    at a constant speed can only go on in one way, so the source's own frames are the answer."""

    _made: list[float] = field(default_factory=list)
    _own: list[float] = field(default_factory=list)
    _held: list[float] = field(default_factory=list)
    _added: list[int] = field(default_factory=list)

    def add(self, made: UInt8s, source: UInt8s, own: UInt8s, given: int) -> None:
        """Compare the frames after the given ones.

        Args:
            made: the continued video, [T, H, W, 3].
            source: the video whose first `given` frames were given.
            own: reconstruction of the source by the embedder.
            given: number of frames that were given.
        """
        frames = range(given, min(len(made), len(source), len(own)))
        self._added.append(len(made) - given)
        self._made.append(_psnr(made, source, frames))
        self._own.append(_psnr(own, source, frames))
        self._held.append(psnr_db(float(np.mean([squared_error(source[given - 1], source[t]) for t in frames]))))

    def to_json(self, direction: float) -> dict[str, Any]:
        """Mean PSNR of the added frames, of the embedder's, and of the last given frame held; `direction` is the share
        of the videos whose added frames move as their captions say."""
        return {
            "videos": len(self._made),
            "added_frames": max(self._added, default=0),
            "psnr_db": float(np.mean(self._made)),
            "embedder_psnr_db": float(np.mean(self._own)),
            "held_psnr_db": float(np.mean(self._held)),
            "direction": direction,
            "targets": {"least_direction": LEAST_DIRECTION},
        }


def _psnr(one: UInt8s, other: UInt8s, frames: range) -> float:
    return psnr_db(float(np.mean([squared_error(other[t], one[t]) for t in frames])))


def missed_continuations(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Describe the missed targets of continued videos."""
    return [
        f"{name}: direction of the added frames {figures['direction']:.1%}, the target is {LEAST_DIRECTION:.0%}"
        for name, figures in found.items()
        if figures["direction"] < LEAST_DIRECTION
    ]
