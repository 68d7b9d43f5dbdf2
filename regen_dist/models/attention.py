"""Self-attention over a grid of video tokens (one function, two patterns), and attention to text.

Legend: B batch, T token frames, H rows, W columns, L = T*H*W tokens, M text tokens, N heads, E width of a head.

A *backend* is the kernel (`models.attention_kernels`); a *pattern* says which tokens see each other. A window pattern
cuts the grid into boxes and attends inside each box alone, so that the cost grows linearly with the size of the video.
Odd layers shift the boxes by half their size, so that information crosses their borders after two layers. Boxes at a
border are smaller instead of padded: no mask is needed, any backend runs (`windows`).
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

from regen_dist.config.embedder import AttentionConfig
from regen_dist.models.attention_kernels import BACKENDS, TextTokens, text_tokens
from regen_dist.models.sequence_parallel import WHOLE, SequenceShard

__all__ = ["Grid", "attention", "cross_attention"]


def cross_attention(q: Tensor, k: Tensor, v: Tensor, text: TextTokens | Tensor, backend: str) -> Tensor:
    """Attention of a video's tokens to those of a text that count.

    Args:
        q: [B, N, L, E].
        k, v: [B, N, M, E]; what they hold where the mask is False changes nothing, as long as `k` is finite.
        text: output of `text_tokens`, or the mask, bool [B, M], True where a token counts. An empty text gives zeros.
        backend: value of `AttentionConfig.backend`.

    Returns:
        [B, N, L, E].

    Raises:
        BackendError: the backend cannot run here.
    """
    if isinstance(text, Tensor):
        text = text_tokens(text, backend)
    v = v.masked_fill(~text.mask[:, None, :, None], 0.0)  # a text without tokens sees its zeros
    return BACKENDS[backend].build.cross(q, k, v, text)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Grid,
    config: AttentionConfig,
    shifted: bool = False,
    share: SequenceShard = WHOLE,
) -> Tensor:
    """Self-attention of a video's tokens.

    Args:
        q, k, v: [B, N, L, E] with L = T*H*W in row-major order of `grid`; of a shared row this rank's part.
        grid: (T, H, W).
        config: backend and pattern.
        shifted: shift the windows by half their size (every other layer does).
        share: this rank's part of the row.

    Returns:
        As `q`, [B, N, L, E].

    Raises:
        BackendError: the backend cannot run here.
    """
    q, k, v = share.to_heads(q, k, v)
    return share.to_tokens(_attend_row(q, k, v, grid, config, shifted))


def _attend_row(q: Tensor, k: Tensor, v: Tensor, grid: Grid, config: AttentionConfig, shifted: bool) -> Tensor:
    """Compute attention of whole rows, for any number of heads."""
    kernels = BACKENDS[config.backend].build
    if config.pattern == "full" or all(w >= g for w, g in zip(config.window, grid, strict=True)):
        return kernels.attend(q, k, v)
    windows = cut_windows(grid, config.window, shifted, q.device)
    batch = q.shape[0]
    q, k, v = (by_windows(tensor, windows) for tensor in (q, k, v))  # [L, B*N, E] each
    if kernels.attend_packed is not None:
        starts, longest = windows.starts, windows.longest
        mixed = kernels.attend_packed(q, k, v, (starts, starts), (longest, longest))
    else:
        mixed = attend_in_groups(kernels.attend, q, k, v, windows)
    return by_tokens(mixed, windows, batch)


# Rotary positions over three axes (Su et al., 2021, RoFormer): clip, row and column of a token.
#
# Each pair of numbers of a query or a key is turned by an angle in proportion to the token's position, so that their
# product depends on the difference of positions alone. There is no table: any size and any number of clips can be
# taken.
#
# Legend: B batch, N heads, L tokens, E width of a head, P = E/2 pairs.
BASE = 10_000.0  # the slowest pair of an axis turns by about 1/BASE radians a step (RoFormer, Sec. 3.2.2)


class RotaryAngles(NamedTuple):
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


def rotary_angles(positions: Tensor, width: int) -> RotaryAngles:
    """The angles of tokens at integer `positions` [L, 3] (clip, row, column), for heads of `width`.

    In float32 whatever the model computes in: bf16 has no integers beyond 256.
    """
    angles = [
        positions[:, axis, None].float() * _frequencies(pairs, positions.device)
        for axis, pairs in enumerate(split_pairs(width))
    ]
    whole = torch.cat(angles, -1)  # [L, P]
    return RotaryAngles(whole.cos(), whole.sin())


def rotate(x: Tensor, by: RotaryAngles) -> Tensor:
    """Queries or keys [B, L, N, E], turned; number i forms a pair with number i + P. Same dtype."""
    first, second = x.float().chunk(2, -1)  # [B, L, N, P] each
    cos, sin = by.cos[:, None], by.sin[:, None]
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.to(x.dtype)


def _frequencies(pairs: int, device: torch.device) -> Tensor:
    """Radians a step, [pairs], from 1 downwards."""
    return BASE ** (-torch.arange(pairs, device=device, dtype=torch.float32) / pairs)


# Windows of attention: one permutation of a row's tokens puts the tokens of each window side by side, another brings
# them back; between them attention is batched over windows of one size, or one call of a kernel for many lengths.
#
# Legend: B batch, N heads, L tokens of a row, M = B*N, E width of a head, n windows of one size, s tokens of each.


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
