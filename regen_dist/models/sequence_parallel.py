"""Rows of tokens that several ranks share, as the models see them (sequence parallelism; Jacobs et al., 2023, DeepSpeed
Ulysses).

Each rank of a group holds a part of every row and works on it alone, but for self-attention: in front of it the ranks
exchange parts of the row for parts of the heads, so that each attends with N/S heads over the whole row, by any kernel
and in any pattern; behind it they change back. What lies before the cut and behind `SequenceShard.whole` is computed
by every rank of a group alike.

Legend: B batch, L tokens of a row, l of this rank's part of it, S ranks that share a row, N heads, E width of a head, C
channels.
"""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor


class SequenceShard:
    """One rank's part of a row. This base class is for a rank that has the row alone: nothing is exchanged."""

    own: slice = slice(None)  # part of the row's tokens

    def to_heads(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Own tokens of all heads, [B, N, l, E] each, to all tokens of own heads, [B, N/S, L, E]. A collective of the
        group."""
        return tensors

    def to_tokens(self, mixed: Tensor) -> Tensor:
        """Undo `to_heads`, [B, N/S, L, E] to [B, N, l, E]. A collective of the group."""
        return mixed

    def own_heads(self, heads: int) -> slice:
        """Return the heads that this rank gets from `to_heads`, out of `heads` in all."""
        return slice(None)

    def whole(self, tokens: Tensor) -> Tensor:
        """Own tokens [B, l, C] to the whole row [B, L, C], the same on every rank. A collective of the group.

        What follows must be the same on all of them, the loss too. The gradient of own tokens is then multiplied by S,
        so that the *mean* of the weights' gradients over the ranks, which the engine takes, is the gradient: of weights
        that were used on parts of the row, and of those that every rank used alike.
        """
        return tokens


WHOLE = SequenceShard()


class Rows:
    """Way in which ranks share rows of tokens. This base class does not share them."""

    size = 1  # S

    def share(self, length: int) -> SequenceShard:
        """This rank's part of a row of `length` tokens."""
        return WHOLE


class RowSharing(nn.Module):
    """A module that can work on a part of its rows of tokens."""

    rows = Rows()


def share_rows(model: nn.Module, rows: Rows) -> None:
    """Let every part of a model that can work on parts of its rows do so."""
    for module in model.modules():
        if isinstance(module, RowSharing):
            module.rows = rows


def row_lengths(length: int, size: int) -> list[int]:
    """Return the number of tokens of a row on each of `size` ranks: as even as possible, the first ones one more."""
    least, more = divmod(length, size)
    return [least + (index < more) for index in range(size)]


class SimulatedSequenceParallel(Rows):
    """Shapes and dependencies of the first rank of `size`, without the others: for counting, not for computing."""

    def __init__(self, size: int) -> None:
        self.size = size

    def share(self, length: int) -> SequenceShard:
        return _PretendedShard(length, self.size)


class _PretendedShard(SequenceShard):
    def __init__(self, length: int, size: int) -> None:
        self.length, self.size = length, size
        self.own = slice(0, row_lengths(length, size)[0])

    def own_heads(self, heads: int) -> slice:
        return slice(0, heads // self.size)

    def to_heads(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        own = torch.stack([tensor[:, : tensor.shape[1] // self.size] for tensor in tensors])
        return torch.cat([own] * self.size, -2)[..., : self.length, :].unbind(0)

    def to_tokens(self, mixed: Tensor) -> Tensor:
        return torch.cat([mixed[:, :, self.own]] * self.size, 1)

    def whole(self, tokens: Tensor) -> Tensor:
        return torch.cat([tokens] * self.size, 1)[:, : self.length]
