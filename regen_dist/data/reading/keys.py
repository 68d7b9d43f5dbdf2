"""What the randomness of a batch's samples is keyed by."""

from __future__ import annotations

from torch import Tensor

_ODD, _NOT_NEGATIVE = 0x1E3779B97F4A7C15, (1 << 63) - 1


def sample_keys(sample_ids: Tensor, epochs: Tensor | None) -> Tensor:
    """Keys int64 [b], not negative: a sample's id, and which time it comes round, so that one that comes twice in a
    batch is not noised alike.

    Args:
        sample_ids: int64 [b].
        epochs: int64 [b], how often each sample has come before; None: never.
    """
    return sample_ids if epochs is None else (sample_ids + epochs * _ODD) & _NOT_NEGATIVE
