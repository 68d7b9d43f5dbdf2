"""Sequence parallelism (Jacobs et al., 2023, DeepSpeed Ulysses): consecutive ranks that share samples, and the rows of
tokens that their models make of them.

The gradients of weights need no exchange of their own: ZeRO-3 takes their mean over all ranks, of a group too (see
`models.sequence_parallel.SequenceShard.whole`).

Legend: as in `models/sequence_parallel.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from regen_dist.distributed.ranks import TIMEOUT, Ranks
from regen_dist.distributed.shared_reading import SharedReader
from regen_dist.models.sequence_parallel import WHOLE, Rows, SequenceShard, row_lengths

Item = TypeVar("Item")


class RowGroup(Rows):
    """The ranks that share samples with this one.

    Args:
        ranks: this process's place.
        size: ranks of the group, S.
        group: their process group; None where there is only one.
        feed: gloo group of the same ranks, for their samples.
    """

    def __init__(self, ranks: Ranks, size: int = 1, group: Any = None, feed: Any = None) -> None:
        self.ranks, self.size, self.group = ranks, size, group
        self.index = ranks.rank % size
        self._reader = SharedReader(feed, ranks.rank - self.index, reads=self.leads)

    @property
    def leads(self) -> bool:
        """Return whether this rank reads and counts the samples of its group, which must happen once."""
        return self.index == 0

    @property
    def readers(self) -> Ranks:
        """Return the place of the group among the groups, each of which reads samples of its own."""
        if self.size == 1:
            return self.ranks
        return Ranks(self.ranks.rank // self.size, self.ranks.world_size // self.size, self.ranks.local_rank)

    def share(self, length: int) -> SequenceShard:
        return WHOLE if self.size == 1 else _RowShard(self, length)

    def read(self, source: Callable[[], Generator[Item]]) -> Generator[Item]:
        """Yield on every rank of the group the items that `source` yields on the first. A failed read or a replacement
        sample on one rank alone cannot make the ranks differ, and each sample is read once. Items arrive ahead of time,
        over a gloo group of their own (see `SharedReader`).

        Raises:
            RegenError: the error of the first rank, on every rank.
        """
        return source() if self.size == 1 else self._reader.read(source)


def join_rows(ranks: Ranks, size: int) -> RowGroup:
    """Groups of `size` consecutive ranks. A collective of all ranks, whose number is a multiple of it."""
    if size == 1:
        return RowGroup(ranks)
    group, _ = dist.new_subgroups(size, timeout=TIMEOUT)
    feed, _ = dist.new_subgroups(size, timeout=TIMEOUT, backend="gloo")
    return RowGroup(ranks, size, group, feed)


class _RowShard(SequenceShard):
    """A part of a row of `length` tokens; the others are on the other ranks."""

    def __init__(self, rows: RowGroup, length: int) -> None:
        self.rows, self.lengths = rows, row_lengths(length, rows.size)
        start = sum(self.lengths[: rows.index])
        self.own = slice(start, start + self.lengths[rows.index])

    def own_heads(self, heads: int) -> slice:
        each = heads // self.rows.size
        return slice(self.rows.index * each, (self.rows.index + 1) * each)

    def to_heads(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        size, count = self.rows.size, len(tensors)
        batch, heads, _, width = tensors[0].shape
        by_rank = torch.stack([each.unflatten(1, (size, -1)).movedim(1, 0) for each in tensors], 1)
        shapes = [(count, batch, heads // size, length, width) for length in self.lengths]
        sizes = [count * batch * heads // size * length * width for length in self.lengths]
        parts = self._exchange(by_rank.flatten(), [by_rank[0].numel()] * size, sizes)
        row = torch.cat([part.view(shape) for part, shape in zip(parts, shapes, strict=True)], -2)
        return row.unbind(0)  # [B, N/S, L, E] each

    def to_tokens(self, mixed: Tensor) -> Tensor:
        size, own = self.rows.size, self.lengths[self.rows.index]
        batch, heads, _, width = mixed.shape
        by_rank = [part.flatten() for part in mixed.split(self.lengths, 2)]
        sizes = [batch * heads * own * width] * size
        parts = self._exchange(torch.cat(by_rank), [part.numel() for part in by_rank], sizes)
        return torch.cat([part.view(batch, heads, own, width) for part in parts], 1)

    def whole(self, tokens: Tensor) -> Tensor:
        return _Gather.apply(tokens, self)  # type: ignore[no-untyped-call, no-any-return]

    def _exchange(self, flat: Tensor, sent: list[int], received: list[int]) -> tuple[Tensor, ...]:
        """Pieces of `flat` of the sizes `sent`, one to each rank; returns those from each, of the sizes `received`."""
        mixed: Tensor = _Exchange.apply(flat, sent, received, self.rows.group)  # type: ignore[no-untyped-call]
        return tuple(torch.split(mixed, received))


class _Exchange(torch.autograd.Function):
    """Exchange tokens all-to-all; the backward pass sends every gradient back to where the number came from."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _all_to_all(flat, sent, received, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grad.contiguous(), ctx.received, ctx.sent, ctx.group), None, None, None


def _all_to_all(flat: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
    out = flat.new_empty(sum(received))
    dist.all_to_all_single(out, flat, received, sent, group=group)
    return out


class _Gather(torch.autograd.Function):
    """Gather the whole row from its parts; the backward pass returns S times the gradient of own tokens (see
    `SequenceShard.whole`)."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, part: _RowShard) -> Tensor:
        ctx.own, ctx.size = part.own, part.rows.size
        missing = part.lengths[0] - tokens.shape[1]  # the first part is the longest, and collectives want equal ones
        padded = F.pad(tokens, (0, 0, 0, missing)).contiguous()
        parts = [torch.empty_like(padded) for _ in part.lengths]
        dist.all_gather(parts, padded, group=part.rows.group)
        return torch.cat([each[:, :length] for each, length in zip(parts, part.lengths, strict=True)], 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.size * grad[:, ctx.own], None
