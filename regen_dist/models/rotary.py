"""Rotary positions over three axes (Su et al., 2021, RoFormer): clip, row and column of a token.

Each pair of numbers of a query or a key is turned by an angle in proportion to the token's position, so that their
product depends on the difference of positions alone. There is no table: any size and any number of clips can be taken.

Legend: B batch, N heads, L tokens, E width of a head, P = E/2 pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BASE = 10_000.0  # the slowest pair of an axis turns by about 1/BASE radians a step (RoFormer, Sec. 3.2.2)


class Turns(NamedTuple):
    """Cosine and sine of every token's angles, float32 [L, P] each."""

    cos: Tensor
    sin: Tensor


def split_pairs(width: int) -> tuple[int, int, int]:
    """Pairs of a head of even `width` that turn with the clip, the row and the column: a third each.

    What does not divide goes to the row first, then to the column, so that the clip has the fewest: it has the fewest
    positions.
    """
    pairs = width // 2
    clip = pairs // 3
    column = (pairs - clip) // 2
    return clip, pairs - clip - column, column


def turns(positions: Tensor, width: int) -> Turns:
    """The angles of tokens at integer `positions` [L, 3] (clip, row, column), for heads of `width`.

    In float32 whatever the model computes in: bf16 has no integers beyond 256.
    """
    angles = [
        positions[:, axis, None].float() * _frequencies(pairs, positions.device)
        for axis, pairs in enumerate(split_pairs(width))
    ]
    whole = torch.cat(angles, -1)  # [L, P]
    return Turns(whole.cos(), whole.sin())


def rotate(x: Tensor, by: Turns) -> Tensor:
    """Queries or keys [B, L, N, E], turned; number i forms a pair with number i + P. Same dtype."""
    first, second = x.float().chunk(2, -1)  # [B, L, N, P] each
    cos, sin = by.cos[:, None], by.sin[:, None]
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.to(x.dtype)


def _frequencies(pairs: int, device: torch.device) -> Tensor:
    """Radians a step, [pairs], from 1 downwards."""
    return BASE ** (-torch.arange(pairs, device=device, dtype=torch.float32) / pairs)
