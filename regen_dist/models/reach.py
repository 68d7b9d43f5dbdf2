"""How far across a frame the parts of an embedder see: what a tile has to know around it to come out as in the whole.

Legend: a cell is a latent's place, P = 8 pixels a side.
"""

from __future__ import annotations

from typing import NamedTuple

from regen_dist.config.schema import SPATIAL_COMPRESSION as P
from regen_dist.config.schema import DecoderConfig, EncoderConfig, ModelConfig


class Reach(NamedTuple):
    """What a cell depends on lies within `cells` of it (rows, columns), if tiles begin at multiples of `step` cells."""

    cells: tuple[int, int]
    step: tuple[int, int] = (1, 1)


def encoder_reach(config: EncoderConfig) -> Reach:
    """Of the encoder: the sum over its convolutions, each of which sees one place further at its own resolution."""
    side: int = config.stem_patch
    pixels = side  # the stem's own convolution
    for stage in config.stages:
        pixels += 2 * stage.blocks * side + (side if stage.spatial * stage.temporal > 1 else 0)
        side *= stage.spatial
    return _square(pixels + (2 * config.out_blocks + 1) * side)  # the last blocks, and the head


def conv_decoder_reach(config: EncoderConfig) -> Reach:
    """Of the baseline's decoder, which mirrors this encoder."""
    side = P
    pixels = (1 + 2 * config.out_blocks) * side
    for stage in reversed(config.stages):
        pixels += side if stage.spatial * stage.temporal > 1 else 0
        side //= stage.spatial
        pixels += 2 * stage.blocks * side
    return _square(pixels + side)


def transformer_reach(config: DecoderConfig) -> Reach | None:
    """Of the generative decoder, or None where every token sees every other one.

    In each block what a cell depends on grows by a cell (the local convolution), then to whole windows, which are
    shifted in every second block.
    """
    if config.attention.pattern == "full":
        return None
    _, rows, columns = config.attention.window
    return Reach((_window_reach(config, rows), _window_reach(config, columns)), (rows, columns))


def _window_reach(config: DecoderConfig, window: int) -> int:
    """The farthest cell that another depends on, along an axis with so long windows."""
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


def decoder_reach(config: ModelConfig) -> Reach | None:
    """Of the decoder that a config describes; None where it sees the whole frame."""
    return conv_decoder_reach(config.encoder) if config.kind == "magvit2" else transformer_reach(config.decoder)


def _square(pixels: int) -> Reach:
    cells = -(-pixels // P)
    return Reach((cells, cells))
