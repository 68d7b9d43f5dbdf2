"""The generative decoder: a diffusion transformer on the pixels of a clip (paper, Sec. 3; blocks after DiT, Peebles &
Xie 2023).

Legend: B batch, T frames, H x W pixels, h = H/8, w = W/8, P = 8, L = T*h*w tokens of pixels, M tokens of the context,
    N heads, D width.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from regen_dist.config.embedder import DecoderConfig, EncoderConfig, ModelConfig
from regen_dist.config.run import SPATIAL_COMPRESSION as P
from regen_dist.models.attention import Grid, attention
from regen_dist.models.layers import BranchLinear, Checkpointed, Modulation, TimestepEmbedding, ZeroLinear, modulate
from regen_dist.models.sequence_parallel import WHOLE, RowSharing, SequenceShard


def fold_tokens(video: Tensor) -> Tensor:
    """[B, 3, T, H, W] to [B, L, 3*P*P]: one token per latent cell and frame."""
    b, c, t, height, width = video.shape
    patches = video.reshape(b, c, t, height // P, P, width // P, P)
    return patches.permute(0, 2, 3, 5, 1, 4, 6).reshape(b, -1, c * P * P)


def unfold_tokens(tokens: Tensor, grid: Grid) -> Tensor:
    """[B, L, 3*P*P] to [B, 3, T, H, W]."""
    t, h, w = grid
    patches = tokens.reshape(-1, t, h, w, 3, P, P)
    return patches.permute(0, 4, 1, 2, 5, 3, 6).reshape(-1, 3, t, h * P, w * P)


class LocalMixing(nn.Module):
    """Depthwise 3x3 convolution over each frame's grid of tokens, added to them (ours).

    Content alone does not distinguish a left neighbour from a right one; this does, and being equivariant to
    shifts it leaves any size and aspect ratio possible (conditional positional encoding; Chu et al., 2021).
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.weight = nn.Parameter(torch.empty(width, 1, 3, 3).uniform_(-1 / 3, 1 / 3))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, grid: Grid, share: SequenceShard = WHOLE) -> Tensor:
        """x [B, M+L, D], its first M tokens (of the context) left as they are; of a shared row this rank's part of it.

        Ranks that share a row exchange parts of it for parts of the channels, as they do for attention.
        """
        if share is WHOLE:
            return x + self._convolve(x, grid, slice(None))
        channels = share.own_heads(self.heads)
        (row,) = share.to_heads(x.unflatten(-1, (self.heads, -1)).transpose(1, 2))  # [B, N/S, M+L, E]
        mixed = self._convolve(row.transpose(1, 2).flatten(2), grid, channels)  # [B, M+L, D/S]
        tokens = share.to_tokens(mixed.unflatten(-1, (row.shape[1], -1)).transpose(1, 2))
        return x + tokens.transpose(1, 2).flatten(2)

    def _convolve(self, x: Tensor, grid: Grid, heads: slice) -> Tensor:
        weight, bias = (each.unflatten(0, (self.heads, -1))[heads].flatten(0, 1) for each in (self.weight, self.bias))
        context = x.shape[1] - prod(grid)
        frames = x[:, context:].unflatten(1, grid).flatten(0, 1).permute(0, 3, 1, 2)  # [B*T, D, h, w]
        mixed = F.conv2d(frames, weight, bias, padding=1, groups=len(weight))
        tokens = mixed.permute(0, 2, 3, 1).reshape(x.shape[0], prod(grid), -1)
        return tokens if context == 0 else F.pad(tokens, (0, 0, context, 0))


class Block(nn.Module):
    """Local mixing, self-attention and a two-layer network, the last two behind adaLN gates. Odd blocks shift their
    attention windows."""

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        width, hidden = config.width, int(config.width * config.mlp_ratio)
        self.heads, self.attention, self.shifted = config.heads, config.attention, index % 2 == 1
        self.local = LocalMixing(width, config.heads) if config.local else None
        # Open gates (ours): with gates at zero the first hundreds of steps go into opening them (docs/embedder.md).
        self.table = nn.Parameter(torch.zeros(6, width))
        with torch.no_grad():
            self.table[[2, 5]] = 1.0
        self.qkv = nn.Linear(width, 3 * width)
        self.out = BranchLinear(width, width, 2 * config.blocks)
        self.expand = nn.Linear(width, hidden)
        self.contract = BranchLinear(hidden, width, 2 * config.blocks)

    def forward(self, x: Tensor, modulation: Tensor, grid: Grid, share: SequenceShard = WHOLE) -> Tensor:
        """x [B, M+L, D], modulation [B, 6, D]; of a shared row this rank's part of x."""
        if self.local is not None:
            x = self.local(x, grid, share)
        parts = (modulation + self.table).unsqueeze(2).unbind(1)  # six of [B, 1, D]
        x = torch.addcmul(x, parts[2], self._attend(modulate(x, parts[0], parts[1]), grid, share))
        return torch.addcmul(x, parts[5], self.contract(F.gelu(self.expand(modulate(x, parts[3], parts[4])))))

    def _attend(self, x: Tensor, grid: Grid, share: SequenceShard) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # [B, N, M+L, E] each
        mixed = attention(q, k, v, grid, self.attention, self.shifted, share)
        return self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class GenerativeDecoder(Checkpointed, RowSharing):
    """Noisy pixels, diffusion time and C_e to a prediction in pixel space."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed = nn.Linear(3 * P * P, config.width)
        self.timestep = TimestepEmbedding(config.width)
        self.modulation = Modulation(config.width, 6)
        self.noise_gate = Modulation(config.width, 1)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.blocks))
        self.final_modulation = Modulation(config.width, 2)
        self.head = ZeroLinear(config.width, 3 * P * P)

    def forward(self, noisy: Tensor, t: Tensor, conditioning: Tensor, context: Tensor | None = None) -> Tensor:
        """Predict from noisy pixels.

        Args:
            noisy: [B, 3, T, H, W].
            t: diffusion time [B].
            conditioning: C_e, or what else is added to the pixel tokens, [B, T, h, w, D]; without context of the
                frames `own_frames` alone.
            context: tokens [B, M, D] in front of the pixels' tokens, dropped at the end; full attention
                alone can take them.

        Returns:
            [B, 3, T, H, W] in float32.
        """
        grid: Grid = (noisy.shape[2], noisy.shape[3] // P, noisy.shape[4] // P)
        vector = self.timestep(t)
        modulation = self.modulation(vector)
        conditioning, gate = conditioning.flatten(1, 3), self.noise_gate(vector)
        x, share = self._start(fold_tokens(noisy.to(self.embed.weight.dtype)), conditioning, gate, grid, context)
        for block in self.blocks:
            x = self.run(block, x, modulation, grid=grid, share=share)
        scale, shift = self.final_modulation(vector).unsqueeze(2).unbind(1)
        pixels = share.whole(self.head(modulate(x, scale, shift)))
        return unfold_tokens(pixels[:, -prod(grid) :].float(), grid)

    def own_frames(self, grid: Grid) -> slice:
        """The frames that this rank's part of a row of pixel tokens lies in."""
        frames, cells = grid[0], grid[1] * grid[2]
        start, stop, _ = self.rows.share(frames * cells).own.indices(frames * cells)
        return slice(start // cells, -(-stop // cells))

    def _start(
        self, pixels: Tensor, conditioning: Tensor, gate: Tensor, grid: Grid, context: Tensor | None
    ) -> tuple[Tensor, SequenceShard]:
        """Return the input of the first block, [B, l, D], and this rank's share of the row."""
        if context is not None:
            x = torch.cat([context, torch.addcmul(conditioning, self.embed(pixels), gate)], 1)  # [B, M+L, D]
            share = self.rows.share(x.shape[1])
            return x[:, share.own], share
        share = self.rows.share(pixels.shape[1])
        start, stop, _ = share.own.indices(pixels.shape[1])
        before = self.own_frames(grid).start * grid[1] * grid[2]  # tokens of frames that are not in `conditioning`
        return torch.addcmul(
            conditioning[:, start - before : stop - before], self.embed(pixels[:, share.own]), gate
        ), share


# Receptive fields of an embedder's parts: the surroundings that a tile needs to give the same result as the whole.
#
# Legend: a cell is a latent's place, P = 8 pixels a side.


class ReceptiveField(NamedTuple):
    """Receptive field of a cell: at most `cells` around it (rows, columns), if tiles begin at multiples of `step`
    cells."""

    cells: tuple[int, int]
    step: tuple[int, int] = (1, 1)


def encoder_receptive_field(config: EncoderConfig) -> ReceptiveField:
    """Return the receptive field of the encoder: the sum over its convolutions, each of which sees one place further at
    its own resolution."""
    side: int = config.stem_patch
    pixels = side  # the stem's own convolution
    for stage in config.stages:
        pixels += 2 * stage.blocks * side + (side if stage.spatial * stage.temporal > 1 else 0)
        side *= stage.spatial
    return _square(pixels + (2 * config.out_blocks + 1) * side)  # the last blocks, and the head


def conv_decoder_receptive_field(config: EncoderConfig) -> ReceptiveField:
    """Return the receptive field of the baseline's decoder, which mirrors this encoder."""
    side = P
    pixels = (1 + 2 * config.out_blocks) * side
    for stage in reversed(config.stages):
        pixels += side if stage.spatial * stage.temporal > 1 else 0
        side //= stage.spatial
        pixels += 2 * stage.blocks * side
    return _square(pixels + side)


def transformer_receptive_field(config: DecoderConfig) -> ReceptiveField | None:
    """Return the receptive field of the generative decoder, or None if every token sees every other one.

    Each block widens the receptive field by a cell (the local convolution), then to whole windows, which are shifted in
    every second block.
    """
    if config.attention.pattern == "full":
        return None
    _, rows, columns = config.attention.window
    return ReceptiveField((_window_reach(config, rows), _window_reach(config, columns)), (rows, columns))


def _window_reach(config: DecoderConfig, window: int) -> int:
    """Return the farthest cell that another depends on, along an axis with windows of this length."""
    farthest = 0
    for cell in range(window):
        low, high = cell, cell
        for block in range(config.blocks):
            low, high = low - config.local, high + config.local
            shift = window // 2 if block % 2 else 0
            low -= (low - shift) % window
            high += window - 1 - (high - shift) % window
        farthest = max(farthest, cell - low, high - cell)
    return farthest


def decoder_receptive_field(config: ModelConfig) -> ReceptiveField | None:
    """Return the receptive field of the decoder that a config describes; None if it sees the whole frame."""
    return (
        conv_decoder_receptive_field(config.encoder)
        if config.kind == "magvit2"
        else transformer_receptive_field(config.decoder)
    )


def _square(pixels: int) -> ReceptiveField:
    cells = -(-pixels // P)
    return ReceptiveField((cells, cells))
