"""Frames cut into tiles that are read with as much around them as their inside depends on: so nothing is blended, and
what comes out is what the whole frame gives, up to rounding. Bounds the memory by the size of a tile, where frames are
large; costs what is computed again around each.

Legend: a cell is a latent's place, P = 8 pixels a side; h x w cells of a frame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from regen_dist.config.run import SPATIAL_COMPRESSION as P
from regen_dist.models.decoder import ReceptiveField
from regen_dist.models.encoder import Latents


class TileCut(NamedTuple):
    """A tile along one axis, in cells of the frame: [start, stop) is kept, [first, last) is read."""

    start: int
    stop: int
    first: int
    last: int


class Tile(NamedTuple):
    """A tile of a frame."""

    rows: TileCut
    columns: TileCut

    def read(self, frames: Tensor, scale: int = 1) -> Tensor:
        """What the tile reads of [..., h, w] latents, or of pixels (`scale` = 8)."""
        rows, columns = (slice(cut.first * scale, cut.last * scale) for cut in self)
        return frames[..., rows, columns]

    def keep(self, out: Tensor, made: Tensor, scale: int = 1) -> None:
        """Put what was made of a tile into the whole frame; what is around it is dropped."""
        rows, columns = (slice(cut.start * scale, cut.stop * scale) for cut in self)
        top, left = ((cut.start - cut.first) * scale for cut in self)
        height, width = ((cut.stop - cut.start) * scale for cut in self)
        out[..., rows, columns] = made[..., top : top + height, left : left + width]


def axis_cuts(length: int, tile: int, reach: int, step: int) -> Iterator[TileCut]:
    """Tiles along an axis of `length` cells: each keeps about `tile` of them, a multiple of `step`."""
    kept, around = max(tile // step, 1) * step, -(-reach // step) * step
    for start in range(0, length, kept):
        stop = min(start + kept, length)
        yield TileCut(start, stop, max(start - around, 0), min(stop + around, length))


def frame_tiles(grid: tuple[int, int], side: int, reach: ReceptiveField) -> Iterator[Tile]:
    """The tiles of a frame of `grid` = (h, w) cells, each about `side` pixels."""
    axes = zip(grid, reach.cells, reach.step, strict=True)
    for rows, columns in product(*(list(axis_cuts(length, side // P, cells, step)) for length, cells, step in axes)):
        yield Tile(rows, columns)


def encode_in_tiles(encode: Callable[[Tensor], Latents], clips: Tensor, side: int, reach: ReceptiveField) -> Latents:
    """Clips [B, 3, T, H, W] to latents, a tile of a clip at a time."""
    return Latents(*map(torch.cat, zip(*(_encode(encode, clip, side, reach) for clip in clips.split(1)), strict=True)))


def _encode(encode: Callable[[Tensor], Latents], clip: Tensor, side: int, reach: ReceptiveField) -> Latents:
    height, width = (length // P for length in clip.shape[-2:])
    whole: Latents | None = None
    for tile in frame_tiles((height, width), side, reach):
        made = encode(tile.read(clip, P))
        if whole is None:
            whole = Latents(*(part.new_empty(*part.shape[:2], height, width) for part in made))
        for out, part in zip(whole, made, strict=True):
            tile.keep(out, part)
    assert whole is not None, "a frame has tiles"
    return whole


def decode_in_tiles(
    decode: Callable[[Latents, Tile], Tensor], latents: Latents, frames: int, side: int, reach: ReceptiveField
) -> Tensor:
    """Latents [1, C, h, w] to pixels [1, 3, T, H, W] in float32, tile by tile.

    Args:
        decode: a tile's latents, and the tile, to its pixels.
        latents: of a clip.
        frames: T.
        side: of a tile in pixels.
        reach: of the decoder.
    """
    height, width = latents.content.shape[-2:]
    out = torch.empty(1, 3, frames, height * P, width * P, device=latents.content.device)
    for tile in frame_tiles((height, width), side, reach):
        tile.keep(out, decode(Latents(*map(tile.read, latents)), tile), P)
    return out
