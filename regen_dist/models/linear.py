"""The linear part of the embedders: each latent cell as a linear code of the pixels that it stands for, and back.

Ours. The convolutions and the transformer learn what a linear code leaves. It starts as a truncated cosine transform of
the cell in space, time and colour (as in JPEG; Ahmed, Natarajan and Rao, 1974), so that a fresh model reconstructs
about as well as such a code does; with weights at random the first thousand steps go into finding it (docs/embedder.md
has the measurement). Time is continuous: cosines can be asked for between frames.

Legend: B batch, T frames, k temporal compression, h x w latent cells, P = 8 pixels a side of a cell, C latent channels,
J time modes.
"""

from __future__ import annotations

import math
from itertools import product
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from regen_dist.config.embedder import ModelConfig
from regen_dist.config.run import SPATIAL_COMPRESSION as P
from regen_dist.models.layers import Frames, fold_patches

PIXELS = 3 * P * P
TIME_MODES = 4  # J: what a clip shows beyond them is left to the SIREN
# Orthonormal: brightness, red against green and blue, blue against the others (rounded BT.601).
_PLANES = ((0.577, 0.577, 0.577), (0.816, -0.408, -0.408), (0.0, -0.707, 0.707))
_LEAST_ROOM = 0.05  # of 1 - mean z^2: latents that were not made by the encoder may lie on the border, or beyond


class Mode(NamedTuple):
    """One cosine: frequencies in time, rows and columns, and the colour plane."""

    time: int
    row: int
    column: int
    plane: int

    @property
    def level(self) -> int:
        """Sum of all its frequencies."""
        return self.time + self.row + self.column


def content_modes(channels: int) -> list[Mode]:
    """The lowest frequencies of a frame, one for each channel."""
    return sorted((Mode(0, *rest) for rest in product(range(P), range(P), range(3))), key=_rank)[:channels]


def motion_modes(channels: int) -> list[Mode]:
    """Return the lowest frequencies of the difference between later frames and the first."""
    every = product(range(TIME_MODES), range(P), range(P), range(3))
    return sorted((Mode(*each) for each in every), key=_rank)[:channels]


def _rank(mode: Mode) -> tuple[int, ...]:
    return (mode.level, mode.plane, -mode.time, mode.row)


def _gain(mode: Mode, moving: bool) -> float:
    """Return the gain that makes a channel's std a few tenths on ordinary video, well inside the latents' ball."""
    return 1 / 16 if mode.level == 0 else 1 / 8 if moving else 1 / 4


def _cosine(frequency: int, at: Tensor, length: int) -> Tensor:
    """The orthonormal DCT-II of `length` places, at real places `at`."""
    scale = math.sqrt((1 if frequency == 0 else 2) / length)
    return scale * torch.cos(math.pi * frequency * (at + 0.5) / length)


def _patch(mode: Mode) -> Tensor:
    """The mode's pixels in a cell, [3*P*P]."""
    at = torch.arange(P, device="cpu", dtype=torch.float32)
    plane = torch.tensor(_PLANES[mode.plane], device="cpu")
    rows, columns = _cosine(mode.row, at, P), _cosine(mode.column, at, P)
    return (plane[:, None, None] * rows[:, None] * columns).flatten()


class EvenLinear(nn.Module):
    """A linear layer of very many inputs that learns at the pace of the others: its weights are stored multiplied by
    the root of their number (equalised learning rate; Karras et al., 2018)."""

    def __init__(self, start: Tensor) -> None:
        """Start from the weights `start` [outputs, inputs]."""
        super().__init__()
        self.scale = 1 / math.sqrt(start.shape[1])
        self.weight = nn.Parameter(torch.empty(start.shape))
        self.bias = nn.Parameter(torch.zeros(start.shape[0]))
        with torch.no_grad():
            self.weight.copy_(start / self.scale)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale, self.bias)


class LinearEncoder(nn.Module):
    """Pixels of a clip to the linear part of its latents, before they are bounded."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        channels, k = config.latent.channels, config.temporal_compression
        self.content = EvenLinear(_content_start(channels, config.linear_start != "random"))
        self.motion = EvenLinear(_motion_start(channels, k, config.linear_start != "random"))

    def forward(self, clip: Frames) -> Frames:
        """Pixels [B, 3, H, W] and [B, 3, k, H, W] to [B, C, h, w] and [B, C, 1, h, w].

        An image goes through the map of motion too, with no cell: ZeRO-3 gathers weights ahead by the order in which a
        step calls its modules, and forgets that order where a step calls others.
        """
        first, rest = fold_patches(clip, P)
        content = self.content(first.movedim(1, -1)).movedim(-1, 1)
        if rest is None:
            nothing = self.motion(content.new_empty(0, self.motion.weight.shape[1]))  # [0, C]
            return Frames(content + nothing.sum(), None)
        cells = torch.cat([first.unsqueeze(2), rest], 2).transpose(1, 2).flatten(1, 2)  # [B, (k+1)*192, h, w]
        return Frames(content, self.motion(cells.movedim(1, -1)).movedim(-1, 1).unsqueeze(2))


def _content_start(channels: int, cosines: bool) -> Tensor:
    """[C, 192]."""
    if not cosines:
        return nn.init.kaiming_uniform_(torch.empty(channels, PIXELS, device="cpu"), a=math.sqrt(5))
    return torch.stack([_gain(mode, False) * _patch(mode) for mode in content_modes(channels)])


def _motion_start(channels: int, k: int, cosines: bool) -> Tensor:
    """Return the weights [C, (k+1)*192] for the difference of the frames after the first from it."""
    if not cosines:
        return nn.init.kaiming_uniform_(torch.empty(channels, (k + 1) * PIXELS, device="cpu"), a=math.sqrt(5))
    rows = []
    for mode in motion_modes(channels):
        later = _cosine(mode.time, torch.arange(k, device="cpu", dtype=torch.float32), k)  # [k]
        weights = torch.cat([-later.sum(0, keepdim=True), later])  # [k+1]
        rows.append(_gain(mode, True) * (weights[:, None] * _patch(mode)).flatten())
    return torch.stack(rows)


class LinearDecoder(nn.Module):
    """Latents to pixels at any times, linear in the latents as they were before they were bounded.

        x(t) = A y_c + min(|t|, 1) sum_j cos(pi j (t - 1/2) / k) (B_j y_m + D_j y_c)

    so that the content alone determines the first frame, as everywhere.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.k = config.temporal_compression
        self.weight = nn.Parameter(torch.zeros(PIXELS, config.latent.channels * (1 + 2 * TIME_MODES)))
        self.bias = nn.Parameter(torch.zeros(PIXELS))
        if config.linear_start != "random":
            with torch.no_grad():
                self.weight.copy_(_decoder_start(config.latent.channels, self.k))

    def forward(self, content: Tensor, motion: Tensor, times: Tensor) -> Tensor:
        """Latents [B, C, h, w] each and times [B, T] in frames to pixels [B, 3, T, 8h, 8w] in float32."""
        y_c, y_m = (unbound_latent(latent).movedim(1, -1).unsqueeze(1) for latent in (content, motion))
        pixels = F.linear(self.features(y_c, y_m, times), self.weight, self.bias)  # [B, T, h, w, 192]
        return _unfold(pixels.float())

    def features(self, y_c: Tensor, y_m: Tensor, times: Tensor) -> Tensor:
        """Return the features that the pixels are linear in: [B, T, h, w, C*(1 + 2J)] of unbound latents [B, 1, h, w,
        C] at times [B, T]."""
        waves = self._waves(times).to(y_c.dtype)  # [B, T, J]
        moving = (waves[:, :, None, None, :, None] * part.unsqueeze(-2) for part in (y_m, y_c))
        parts = [y_c.expand(-1, times.shape[1], -1, -1, -1), *(part.flatten(-2) for part in moving)]
        return torch.cat(parts, -1)

    def _waves(self, times: Tensor) -> Tensor:
        at = times.float() - 1
        waves = torch.stack([_cosine(frequency, at, self.k) for frequency in range(TIME_MODES)], -1)
        return waves * times.float().abs().clamp(max=1.0).unsqueeze(-1)


def _decoder_start(channels: int, k: int) -> Tensor:
    """[192, C*(1 + 2J)]: the transpose of the encoder's, the gains undone."""
    start = torch.zeros(PIXELS, channels * (1 + 2 * TIME_MODES), device="cpu")
    for channel, mode in enumerate(content_modes(channels)):
        start[:, channel] = _patch(mode) / _gain(mode, False)
    for channel, mode in enumerate(motion_modes(channels)):
        start[:, channels * (1 + mode.time) + channel] = _patch(mode) / _gain(mode, True)
    return start


def _unfold(pixels: Tensor) -> Tensor:
    """[B, T, h, w, 3*P*P] to [B, 3, T, 8h, 8w]."""
    b, t, h, w, _ = pixels.shape
    video = pixels.reshape(b, t, h, w, 3, P, P).permute(0, 4, 1, 2, 5, 3, 6)
    return video.reshape(b, 3, t, h * P, w * P)


def unbound_latent(latent: Tensor) -> Tensor:
    """Undo `encoder.bound_latent`: z / sqrt(1 - mean z^2) over the channels of each cell. Shape [B, C, h, w]."""
    room = (1 - latent.float().square().mean(1, keepdim=True)).clamp(min=_LEAST_ROOM)
    return latent * torch.rsqrt(room).to(latent.dtype)
