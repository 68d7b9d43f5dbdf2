"""Decoders that a trained one must beat.

They take whole frames, far more data than two latents, and their clips are cut, streamed and blended like the codec's.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from regen_dist.errors import ConfigError
from regen_dist.inference.codec import Window, blend_weights
from regen_dist.models.encoder import Latents

TrivialKind = Literal["repeat_first", "blend", "mean"]
TRIVIAL_KINDS: tuple[TrivialKind, ...] = get_args(TrivialKind)
LABELS: dict[TrivialKind, str] = {
    "repeat_first": "Repeat the first frame",
    "blend": "Blend first and last frame",
    "mean": "Mean of the clip",
}


class TrivialCodec:
    """Codec that keeps one or two frames of a clip: `repeat_first`, `blend` (first to last, linear in time) or `mean`.

    It has the interface of `regen_dist.inference.long_video.VideoCodec`. Its "latents" are pixels [B, 3, H, W].
    """

    def __init__(self, kind: TrivialKind, num_frames: int) -> None:
        if kind not in TRIVIAL_KINDS:
            raise ConfigError(f"no trivial decoder is called {kind!r}; there are {', '.join(TRIVIAL_KINDS)}")
        self.kind: str = kind
        self.num_frames = num_frames

    def encode(self, clips: Tensor) -> Latents:
        """Encode clips [B, 3, T, H, W] as two frames [B, 3, H, W] each."""
        first = clips.mean(dim=2) if self.kind == "mean" else clips[:, :, 0]
        last = clips[:, :, -1] if self.kind == "blend" else first
        return Latents(first, last)

    def decode_windows(
        self, windows: list[Window], times: Tensor, *, steps: int = 1, seed: int = 0, sample_id: int = 0
    ) -> Tensor:
        """Decode frames [1, 3, F, H, W] at `times` [F], blending overlapping windows. Steps and noise are ignored."""
        weights = blend_weights([window.start for window in windows], windows[0].length, times).float()
        frames = [
            self._decode(window, times) * weight[:, None, None] for window, weight in zip(windows, weights, strict=True)
        ]
        return torch.stack(frames).sum(dim=0)[None]

    def _decode(self, window: Window, times: Tensor) -> Tensor:
        """Decode one window at all times, [3, F, H, W]."""
        along = ((times - window.start) / max(window.length - 1, 1)).float().clamp(0, 1)
        return torch.lerp(window.latents.content[0][:, None], window.latents.motion[0][:, None], along[:, None, None])
