"""Tiled encoding and decoding of frames. Each tile is read with its full receptive field, so nothing is blended and the
result equals that of the whole frame up to rounding. Memory is bounded by the size of a tile; the cost is that the
surroundings of each tile are computed again.

Legend: a cell is the position of one latent, P = 8 pixels a side; h x w cells of a frame.
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
        """Crop the region that the tile reads from [..., h, w] latents, or from pixels (`scale` = 8)."""
        rows, columns = (slice(cut.first * scale, cut.last * scale) for cut in self)
        return frames[..., rows, columns]

    def keep(self, out: Tensor, made: Tensor, scale: int = 1) -> None:
        """Write the result of a tile into the whole frame, without its surroundings."""
        rows, columns = (slice(cut.start * scale, cut.stop * scale) for cut in self)
        top, left = ((cut.start - cut.first) * scale for cut in self)
        height, width = ((cut.stop - cut.start) * scale for cut in self)
        out[..., rows, columns] = made[..., top : top + height, left : left + width]


def axis_cuts(length: int, tile: int, reach: int, step: int) -> Iterator[TileCut]:
    """Cut an axis of `length` cells into tiles: each keeps about `tile` cells, a multiple of `step`."""
    kept, around = max(tile // step, 1) * step, -(-reach // step) * step
    for start in range(0, length, kept):
        stop = min(start + kept, length)
        yield TileCut(start, stop, max(start - around, 0), min(stop + around, length))


def frame_tiles(grid: tuple[int, int], side: int, reach: ReceptiveField) -> Iterator[Tile]:
    """Cut a frame of `grid` = (h, w) cells into tiles of about `side` pixels a side."""
    axes = zip(grid, reach.cells, reach.step, strict=True)
    for rows, columns in product(*(list(axis_cuts(length, side // P, cells, step)) for length, cells, step in axes)):
        yield Tile(rows, columns)


def encode_in_tiles(encode: Callable[[Tensor], Latents], clips: Tensor, side: int, reach: ReceptiveField) -> Latents:
    """Encode clips [B, 3, T, H, W] to latents, one tile of one clip at a time."""
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
    """Decode latents [1, C, h, w] to pixels [1, 3, T, H, W] in float32, tile by tile.

    Args:
        decode: map from a tile's latents and the tile to its pixels.
        latents: latents of one clip.
        frames: T.
        side: side of a tile in pixels.
        reach: receptive field of the decoder.
    """
    height, width = latents.content.shape[-2:]
    out = torch.empty(1, 3, frames, height * P, width * P, device=latents.content.device)
    for tile in frame_tiles((height, width), side, reach):
        tile.keep(out, decode(Latents(*map(tile.read, latents)), tile), P)
    return out
