"""Given latent frames, which are not generated: the image that a video begins with, or the clips that it continues.

A given frame stays clean, has the time of clean data (0) and counts for no loss; the others attend to it. The content
latent depends on a clip's first frame alone (paper, Sec. 3), so an image alone gives the content of the first clip.

Legend: B rows, C channels, F latent frames (content, motion, content, motion, ...), h x w latent cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regen_dist.config.t2v import FlowConfig
from regen_dist.diffusion.noise import NoiseStream, uniforms

_CLIP_FRAMES = 2  # content and motion


@dataclass(frozen=True, eq=False)
class Given:
    """Frames of rows that are given: `clean` [B, C, F, h, w] is used where `mask`, bool [B, F], is True."""

    clean: Tensor
    mask: Tensor

    @classmethod
    def joined(cls, rows: Sequence[Given]) -> Given:
        """Join rows of one shape into a batch."""
        return cls(torch.cat([row.clean for row in rows]), torch.cat([row.mask for row in rows]))

    def times(self, t: Tensor) -> Tensor:
        """Return the times of the frames, [B, F], from the times [B] of their rows: 0 for given frames."""
        return torch.where(self.mask, 0.0, t[:, None])

    def put_into(self, x: Tensor) -> Tensor:
        """Return x [B, C, F, h, w] with the given frames in place."""
        return torch.where(self.mask[:, None, :, None, None], self.clean.to(x.dtype), x)


def drawn(flow: FlowConfig, seed: int, keys: Tensor, step: int, clean: Tensor) -> Given | None:
    """Choose the given frames of a training step: a function of (seed, step, sample), independent of batch and rank.

    Args:
        flow: holds the share of rows with a given first content latent, and the share with whole first clips given.
        seed: seed of the run.
        keys: keys of the rows, int64 [B].
        step: step of the training.
        clean: the rows, [B, C, F, h, w]; an image alone (F = 1) is never given.

    Returns:
        None if the config gives no frames.
    """
    content, clips, frames = flow.given_content, flow.given_clips, clean.shape[2]
    if not content + clips:
        return None
    chance, quantile = uniforms(seed, keys, step, NoiseStream.GIVEN)[:, :2].unbind(1)  # [B] each
    most = max(frames // _CLIP_FRAMES - 1, 0)  # clips that may be given: one at least is generated
    some = (quantile * most).long() + min(most, 1)  # [B], 1 ... most alike
    counts = torch.where(chance < content, min(frames - 1, 1), _CLIP_FRAMES * some)
    counts = torch.where(chance < content + clips, counts, 0)
    return Given(clean, torch.arange(frames, device=keys.device) < counts[:, None])


def error_of_the_rest(prediction: Tensor, target: Tensor, given: Given) -> Tensor:
    """Mean squared error over the frames that are not given, each row with the same weight."""
    squares = (prediction - target).square().mean((1, 3, 4))  # [B, F]
    rest = ~given.mask
    return ((squares * rest).sum(1) / rest.sum(1)).mean()
