"""The space in which a text-to-video model works: latents with the mean and std of each channel taken out (of the std
only a part, where the run says so).

`NormalisedLatents` are a type of their own, so that nothing can decode them by mistake: a codec takes `Latents` alone,
and only `LatentScale.restore` makes those of them.

Legend: B batch, n clips, C channels, h x w latent cells, F latent frames: 2n (content, motion of each clip), or 1 for
an image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regen_dist.errors import CheckpointError, DataError
from regen_dist.inference.statistics import ChannelStatistics, LatentStatistics
from regen_dist.models import Latents

_LEAST_STD = 1e-4  # a channel that never changes is left as it is


@dataclass(frozen=True, eq=False)
class NormalisedLatents:
    """Latent frames of a row of clips, normalised: float32 [B, C, F, h, w]."""

    frames: Tensor

    @property
    def is_image(self) -> bool:
        """Whether each is the content latent of an image alone."""
        return self.frames.shape[2] == 1


class LatentScale:
    """Takes the mean and std of each channel out of latents, and puts them back.

    Content and motion have statistics of their own; an image (F = 1) has those of images, where any were measured, and
    else those of clips' content, which are latents of first frames, too.
    """

    def __init__(self, statistics: LatentStatistics, whitening: float = 1.0) -> None:
        """`whitening` in [0, 1] is the share of the channels' different strengths that is taken out: 1 gives each a std
        of 1, less leaves it std^(1 - whitening), scaled so that the mean square over the channels is 1."""
        clips, images = statistics.clips, statistics.images
        content = clips or images
        if content is None:
            raise CheckpointError("the latent statistics are of nothing; run `regen preencode` again")
        motion = None if clips is None else clips.motion
        self._clip = [_scale(content.content, whitening), _scale(motion or content.content, whitening)]
        self._image = _scale((images or content).content, whitening)

    def normalise(self, content: Tensor, motion: Tensor) -> NormalisedLatents:
        """Latents of rows of clips, each [B, n, C, h, w] of any floating type; of images, motion [B, 0, C, h, w]."""
        if motion.shape[1] == 0:
            frames = content[:, :1].float()
        elif motion.shape == content.shape:
            frames = torch.stack([content.float(), motion.float()], 2).flatten(1, 2)  # [B, 2n, C, h, w]
        else:
            raise DataError(f"content {list(content.shape)} and motion {list(motion.shape)} are not of the same clips")
        mean, std = self._of(frames)
        return NormalisedLatents(((frames - mean) / std).transpose(1, 2).contiguous())

    def restore(self, latents: NormalisedLatents) -> list[Latents]:
        """What a codec decodes: for each clip of the row its latents, [B, C, h, w] each; an image's motion is zero."""
        frames = latents.frames.transpose(1, 2)  # [B, F, C, h, w]
        mean, std = self._of(frames)
        raw = frames * std + mean
        if latents.is_image:
            return [Latents(raw[:, 0], torch.zeros_like(raw[:, 0]))]
        return [Latents(raw[:, frame], raw[:, frame + 1]) for frame in range(0, raw.shape[1], 2)]

    def _of(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std for each frame of [B, F, C, h, w], as [1, F, C, 1, 1]."""
        each = [self._image] if frames.shape[1] == 1 else self._clip * (frames.shape[1] // 2)
        mean, std = (torch.stack([one[part] for one in each]).to(frames.device) for part in (0, 1))
        return mean[None, :, :, None, None], std[None, :, :, None, None]


def only_raw(latents: Latents) -> Latents:
    """What a codec decodes, or DataError: normalised latents would decode to something, but to nothing meant."""
    if not isinstance(latents, Latents):
        raise DataError(
            f"a codec decodes Latents, found {type(latents).__name__}; of normalised latents LatentScale.restore makes "
            "them, with the statistics that they were normalised by"
        )
    return latents


def _scale(of: ChannelStatistics, whitening: float) -> tuple[Tensor, Tensor]:
    """What is taken off each channel, and what it is then divided by."""
    std = of.std.float()
    known = torch.where(std < _LEAST_STD, 1.0, std)
    left = known ** (1 - whitening)
    return of.mean.float(), known / left * left.square().mean().sqrt()
