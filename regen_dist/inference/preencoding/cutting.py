"""How a video becomes clips: which frames, and which part of them.

Clips lie one after the other from the first frame on, without overlap; what is left at the end is left out. A video
that is shorter than a clip becomes an image, its first frame.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from regen_dist.config.preencode import PreencodeConfig
from regen_dist.data.dataset.index import Sample
from regen_dist.data.order.order import Bucket
from regen_dist.data.reading.clips import clip_geometry
from regen_dist.data.reading.pools import best_size
from regen_dist.data.video.reader import Geometry
from regen_dist.errors import DataError
from regen_dist.inference.preencoding.identity import SIDE_MULTIPLE

Int64s = npt.NDArray[np.int64]


class Cut(NamedTuple):
    """A video's clips: `clips` of `length` frames, `stride` frames of the video apart; 0 of length 1 for an image.
    `left_out` counts the frames, `stride` apart, at the end that are in no clip."""

    clips: int
    length: int
    stride: int
    geometry: Geometry
    left_out: int

    @property
    def parts(self) -> int:
        """Content latents: the clips, or 1 for an image."""
        return max(1, self.clips)

    @property
    def frames(self) -> int:
        """Frames that are encoded."""
        return self.parts * self.length

    @property
    def is_image(self) -> bool:
        """Whether there is no motion latent."""
        return self.clips == 0


NO_CUT = Cut(0, 1, 1, Geometry(0, 0, 0, 0, (0, 0)), 0)  # of a video that has none


def cut_video(sample: Sample, config: PreencodeConfig, num_frames: int) -> Cut:
    """The clips of a video.

    Args:
        sample: the video.
        config: says how it is cut.
        num_frames: of a clip (k + 1).

    Raises:
        DataError: it is too small for any latent.
    """
    clips = int(count_clips(np.array([sample.frames], np.int64), config, num_frames)[0])
    length = num_frames if clips else 1
    size = _size(sample, config)
    geometry = clip_geometry(sample.height, sample.width, Bucket(*size, length), "fit" if config.buckets else None)
    taken = -(-sample.frames // config.stride)
    return Cut(clips, length, config.stride, geometry, taken - max(1, clips) * length)


def count_clips(frames: Int64s, config: PreencodeConfig, num_frames: int) -> Int64s:
    """Whole clips of videos of so many frames [n]: 0 for those that become images."""
    clips: Int64s = -(-frames // config.stride) // num_frames
    return clips if config.max_clips is None else np.minimum(clips, config.max_clips)


def _size(sample: Sample, config: PreencodeConfig) -> tuple[int, int]:
    """The crop that suits a video best; without buckets as much of it as fits the latent."""
    if config.buckets:
        height, width = np.array([sample.height], np.int32), np.array([sample.width], np.int32)
        return config.buckets[int(best_size(height, width, config.buckets)[0])]
    rows, columns = (side // SIDE_MULTIPLE * SIDE_MULTIPLE for side in (sample.height, sample.width))
    if not rows or not columns:
        raise DataError(
            f"{sample.height}x{sample.width} is too small: without buckets both sides must be at least {SIDE_MULTIPLE}"
        )
    return rows, columns
