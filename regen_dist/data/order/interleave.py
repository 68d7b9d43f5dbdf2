"""Interleaving of several endless sequences into one, in exact shares, with random access.

The merged sequence is cut into short rounds. Round e holds f(e + 1) - f(e) items of part i, f(e) = floor(e q + phase),
so the shares stay exact; a keyed shuffle of each round gives the order of the parts. The items of each part keep their
own order. Any position is computed directly from the closed form of f, without iteration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import ceil, lcm

import numpy as np

from regen_dist.data.order.permutation import GOLDEN, Int64s, UInt64s, mix_bits

_ROUND = 256  # most items of a round: bounds the memory, and the length after which the shares are exact


@dataclass(frozen=True)
class Interleave:
    """Interleaving of `len(steps)` sequences, created by `Interleave.of`.

    Each round holds `steps[i] / scale` items of part i on average.
    """

    steps: tuple[int, ...]
    scale: int
    key: int

    @classmethod
    def of(cls, quotas: Sequence[Fraction], key: int) -> Interleave:
        """Interleave parts in the proportion of `quotas` (at least one above 0), shuffled by `key`.

        If the quotas are integers, every `sum(quotas)` items from the start hold exactly `quotas[i]` of part i.
        """
        period = sum(quotas, Fraction())
        rounds = Fraction(ceil(period / _ROUND)) if period >= 1 else 1 / Fraction(ceil(1 / period))
        scale = lcm(*((quota / rounds).denominator for quota in quotas))
        return cls(tuple(int(quota / rounds * scale) for quota in quotas), scale, key)

    def at(self, first: int, count: int) -> tuple[Int64s, Int64s]:
        """Return the part of each merged position first, first + 1, …, and the index within the part's sequence.

        Returns:
            (parts [count], indexes [count]).
        """
        used = [part for part, step in enumerate(self.steps) if step]
        if len(used) == 1:
            return np.full(count, used[0], dtype=np.int64), np.arange(first, first + count, dtype=np.int64)
        start_round, end_round = self._round_of(first), self._round_of(first + count - 1)
        lay_out = _lay_out_one if start_round == end_round else _lay_out
        parts, indexes = lay_out(self, start_round, end_round)
        start = first - sum(self.taken(start_round))
        return parts[start : start + count].copy(), indexes[start : start + count].copy()

    def taken(self, rounds: int) -> list[int]:
        """Return the number of items of each part in the first `rounds` rounds.

        The phases of the parts differ, so that rare parts (less than one item a round) do not fall into the same round.
        """
        halves = 2 * len(self.steps)
        return [
            (rounds * step + self.scale * (2 * part + 1) // halves) // self.scale if step else 0
            for part, step in enumerate(self.steps)
        ]

    def _round_of(self, position: int) -> int:
        """Return the last round that starts at or before `position`; the estimate is off by at most a round per
        part."""
        number = position * self.scale // sum(self.steps)
        while sum(self.taken(number)) > position:
            number -= 1
        while sum(self.taken(number + 1)) <= position:
            number += 1
        return number


def _lay_out(merge: Interleave, first: int, last: int) -> tuple[Int64s, Int64s]:
    """Return parts and indexes of all items of the rounds first … last."""
    taken = np.array([merge.taken(number) for number in range(first, last + 2)], dtype=np.int64)
    amounts = np.diff(taken, axis=0)  # [rounds, parts]
    rounds = np.repeat(np.arange(len(amounts)), amounts.sum(axis=1))
    parts = np.repeat(np.tile(np.arange(amounts.shape[1]), len(amounts)), amounts.ravel())
    parts = parts[np.lexsort((_shuffle_keys(rounds, first, merge.key), rounds))]
    totals = amounts.sum(axis=0)
    numbers = np.arange(len(parts)) + np.repeat(taken[0] - (np.cumsum(totals) - totals), totals)
    indexes = np.empty_like(numbers)
    indexes[np.argsort(parts, kind="stable")] = numbers
    return parts, indexes


def _shuffle_keys(rounds: Int64s, first: int, key: int) -> UInt64s:
    """Return one random word per item, a function of its round and slot only; `rounds` are counted from `first`."""
    slots = np.arange(len(rounds)) - np.searchsorted(rounds, rounds)
    seeds = mix_bits(rounds.astype(np.uint64) + np.array([(first + key) % 2**64], dtype=np.uint64))
    keys: UInt64s = mix_bits(seeds + slots.astype(np.uint64) * np.array([GOLDEN], dtype=np.uint64))
    return keys


_lay_out_one = lru_cache(maxsize=64)(_lay_out)
