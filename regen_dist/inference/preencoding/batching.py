"""Clips of one size encoded together, and handed back as videos in the order in which they came.

Legend: n clips of a video, T frames, H x W pixels, h = H/8, w = W/8.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from regen_dist.data.dataset.index import Sample
from regen_dist.data.video.pixels import UInt8s
from regen_dist.inference.encoder import FrozenEncoder
from regen_dist.inference.preencoding.cutting import Cut
from regen_dist.models.encoder import Latents
from regen_dist.pixels import to_float

_BATCHES_HELD = 4  # of pixels, over all sizes; a dataset without buckets may have as many sizes as videos


@dataclass
class Pending:
    """A video of which something may still be missing: latents [1, C, h, w] in bf16 by number of the clip; `problem` is
    why there will be none."""

    sample: Sample
    cut: Cut
    done: dict[int, Latents] = field(default_factory=dict)
    problem: str | None = None

    @property
    def is_complete(self) -> bool:
        """Whether nothing is missing any more."""
        return self.problem is not None or len(self.done) == self.cut.parts

    def latents(self) -> Latents:
        """Content [n, C, h, w] and motion alike, [0, C, h, w] for an image."""
        parts = [self.done[number] for number in range(self.cut.parts)]
        content, motion = (torch.cat(latents) for latents in zip(*parts, strict=True))
        return Latents(content, motion[:0] if self.cut.is_image else motion)


def encode_pixels(encoder: FrozenEncoder, clips: list[UInt8s]) -> Latents:
    """Clips uint8 [3, T, H, W] of one size to latents as they are stored: bf16, on the CPU.

    Convolutions are asked for kernels that give the same bits each time.
    """
    video = torch.from_numpy(np.stack(clips)).to(encoder.device)  # B 3 T H W
    tf32 = torch.backends.cudnn.allow_tf32
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=tf32):
        latents = encoder.encode(to_float(video))
    return Latents(*(_stored(part) for part in latents))


class Batches:
    """Gathers clips into batches. What is in a batch follows from the clips that came before, in order, alone.

    Args:
        encoder: encodes them.
        size: clips of a batch.
        videos: whose clips they are, in the order in which they are handed back.
    """

    def __init__(self, encoder: FrozenEncoder, size: int, videos: Sequence[Pending]) -> None:
        self._encoder, self._size, self._videos = encoder, size, deque(videos)
        self._waiting: dict[tuple[int, ...], list[tuple[Pending, int, UInt8s]]] = {}

    def add(self, video: Pending, number: int, clip: UInt8s) -> None:
        """A clip of a video, uint8 [3, T, H, W]; encodes when that fills a batch, or when too much is held."""
        key = clip.shape
        self._waiting.setdefault(key, []).append((video, number, clip))
        if len(self._waiting[key]) == self._size:
            self._encode(key)
        elif sum(map(len, self._waiting.values())) >= _BATCHES_HELD * self._size:
            self._encode(max(self._waiting, key=lambda each: len(self._waiting[each])))

    def finish(self) -> None:
        """Encode what is left."""
        for key in list(self._waiting):
            self._encode(key)

    def complete(self) -> Iterator[Pending]:
        """Take the first videos, up to one of which something is missing."""
        while self._videos and self._videos[0].is_complete:
            yield self._videos.popleft()

    def _encode(self, key: tuple[int, ...]) -> None:
        batch = self._waiting.pop(key)
        latents = encode_pixels(self._encoder, [clip for _, _, clip in batch])
        for place, (video, number, _) in enumerate(batch):
            video.done[number] = Latents(*(part[place : place + 1] for part in latents))


def _stored(latents: Tensor) -> Tensor:
    return latents.to("cpu", torch.bfloat16)
