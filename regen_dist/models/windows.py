"""Windows of attention: one permutation of a row's tokens puts the tokens of each window side by side, another brings
them back; between them attention is batched over windows of one size, or one call of a kernel for many lengths.

Legend: B batch, N heads, L tokens of a row, M = B*N, E width of a head, n windows of one size, s tokens of each.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise, product
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

Grid = tuple[int, int, int]
Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


class Windows(NamedTuple):
    """Partition of a grid into windows.

    `order` [L] lists the tokens window by window, windows of one size together; `places` [L] is where each went.
    `groups` are (windows, tokens of each), in that order, and `starts` [windows + 1] where each window begins (int32,
    as kernels for many lengths take it). All tensors are on one device.
    """

    order: Tensor
    places: Tensor
    groups: tuple[tuple[int, int], ...]
    starts: Tensor

    @property
    def longest(self) -> int:
        """Tokens of the largest window."""
        return max(size for _, size in self.groups)


def segments(length: int, window: int, shift: int) -> list[range]:
    """Cut an axis into windows: a first one of `shift` tokens, full ones, and what remains.

    Args:
        length: tokens along the axis.
        window: tokens of a full window.
        shift: size of the first, partial window; 0 for none.
    """
    borders = [0, *range(shift or window, length, window), length]
    return [range(start, stop) for start, stop in pairwise(borders)]


@lru_cache(maxsize=64)
def cut_windows(grid: Grid, window: Grid, shifted: bool, device: torch.device) -> Windows:
    """The windows of a grid of (T, H, W) tokens in row-major order, shifted by half their size or not."""
    axes = [
        segments(length, size, size // 2 if shifted and size < length else 0)
        for length, size in zip(grid, window, strict=True)
    ]
    row = torch.arange(prod(grid), device="cpu").view(grid)
    by_size = defaultdict[int, list[Tensor]](list)
    for t, h, w in product(*axes):
        box = row[t.start : t.stop, h.start : h.stop, w.start : w.stop].flatten()
        by_size[len(box)].append(box)
    order = torch.cat([box for boxes in by_size.values() for box in boxes])
    groups = tuple((len(boxes), size) for size, boxes in by_size.items())
    sizes = torch.tensor([0, *(size for count, size in groups for _ in range(count))], device="cpu")
    tensors = order, order.argsort(), sizes.cumsum(0).int()
    order, places, starts = (each.to(device) for each in tensors)
    return Windows(order, places, groups, starts)


def by_windows(x: Tensor, windows: Windows) -> Tensor:
    """[B, N, L, E] to [L, M, E], window by window: tokens lead, so that windows of one size are one piece of memory."""
    moved: Tensor = _Permuted.apply(x.permute(2, 0, 1, 3), windows.order, windows.places)  # type: ignore[no-untyped-call]
    return moved.flatten(1, 2)


def by_tokens(x: Tensor, windows: Windows, batch: int) -> Tensor:
    """The inverse of `by_windows`."""
    moved: Tensor = _Permuted.apply(x, windows.places, windows.order)  # type: ignore[no-untyped-call]
    tokens: Tensor = moved.unflatten(1, (batch, -1)).permute(1, 2, 0, 3)
    return tokens


def attend_in_groups(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, windows: Windows) -> Tensor:
    """A kernel that takes [n, M, s, E], once for each size of windows: in a shifted grid at most 27, mostly 8.

    Args:
        kernel: attention of [batch, heads, tokens, E].
        q, k, v: [L, M, E] each, by windows.
        windows: windows of the grid.

    Returns:
        [L, M, E], by windows.
    """
    lengths = [count * size for count, size in windows.groups]
    parts = zip(*(each.split(lengths) for each in (q, k, v)), strict=True)
    mixed = [_attended(kernel, part, group) for part, group in zip(parts, windows.groups, strict=True)]
    return mixed[0] if len(mixed) == 1 else torch.cat(mixed)


def _attended(kernel: Kernel, tokens: Sequence[Tensor], group: tuple[int, int]) -> Tensor:
    """Windows of one size, [n*s, M, E]: views for the kernel, no copies."""
    mixed = kernel(*(each.unflatten(0, group).transpose(1, 2) for each in tokens))  # [n, M, s, E]
    return mixed.transpose(1, 2).flatten(0, 1)


class _Permuted(torch.autograd.Function):
    """Rows in another order. Backward is the inverse order: a read, where indexing would add into zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, places: Tensor) -> Tensor:
        ctx.places = places
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.places), None, None
