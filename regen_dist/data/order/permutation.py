"""Keyed permutations of [0, size) and the interleaving of endless sequences: constant time and memory per element, no
tables.

`mix_bits` and the Feistel network work on Python ints and on uint64 arrays alike: for the few rows of a micro-batch
ints are several times faster than arrays, for many rows arrays are faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import ceil, lcm
from typing import Any

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]
UInt64s = npt.NDArray[np.uint64]
Word = Any  # an int in [0, 2**64), or an array of uint64 for many at once

_ROUNDS = 8
_CHUNK = 1 << 15  # elements permuted at once: their temporaries stay in the CPU cache
_FEW = 32  # up to this many elements Python ints are faster
_MASK = 0xFFFFFFFFFFFFFFFF
GOLDEN = 0x9E3779B97F4A7C15
_ROUND_KEYS = [(index + 1) * GOLDEN & _MASK for index in range(_ROUNDS)]


def permute(places: Int64s, epochs: Int64s, sizes: Int64s | int, seed: int, lines: Int64s | int = 0) -> Int64s:
    """Return the rows of the samples at `places` in their `epochs` of their `lines` (strata), each of `sizes` rows.

    For each (seed, stratum, epoch) the map is a permutation of [0, size): a Feistel network over the next power of two,
    iterated until the value is below `size` (cycle walking).

    Args:
        places: [n], each in [0, size).
        epochs: [n].
        sizes: rows of the stratum, [n] or one for all; below 2**62.
        seed: key of the permutation, in [0, 2**64).
        lines: numbers of the strata, [n] or one for all; each number has its own permutations.

    Returns:
        rows [n].
    """
    sizes, lines = np.broadcast_to(sizes, places.shape), np.broadcast_to(lines, places.shape)
    if len(places) <= _FEW:
        columns = zip(places.tolist(), epochs.tolist(), sizes.tolist(), lines.tolist(), strict=True)
        return np.array([_permute_one(*row, seed=seed) for row in columns], dtype=np.int64)
    rows = np.empty(len(places), dtype=np.int64)
    for start in range(0, len(places), _CHUNK):
        part = slice(start, start + _CHUNK)
        rows[part] = _permute_chunk(places[part], epochs[part], sizes[part], lines[part], seed)
    return rows


def mix_bits(word: Word) -> Word:
    """Apply a bijection of 64-bit words in which every input bit affects every output bit (SplitMix64 finaliser)."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK
    return word ^ (word >> 31)


def combine_keys(*words: int) -> int:
    """Combine several integers into one 64-bit key; their order matters."""
    key = 0
    for word in words:
        key = mix_bits((key + word + GOLDEN) & _MASK)
    return key


def _permute_one(place: int, epoch: int, size: int, line: int, *, seed: int) -> int:
    bits = max(2, (size - 1).bit_length())
    key = _key(epoch, line, seed)
    row: int = _feistel(place, key, bits)
    while row >= size:
        row = _feistel(row, key, bits)
    return row


def _permute_chunk(places: Int64s, epochs: Int64s, sizes: Int64s, lines: Int64s, seed: int) -> Int64s:
    limits, bits = sizes.astype(np.uint64), _bit_lengths(sizes)
    keys = _key(epochs.astype(np.uint64), lines.astype(np.uint64), seed)
    rows: UInt64s = _feistel(places.astype(np.uint64), keys, bits)
    outside = np.flatnonzero(rows >= limits)
    while len(outside):
        rows[outside] = _feistel(rows[outside], keys[outside], bits[outside])
        outside = outside[rows[outside] >= limits[outside]]
    return rows.astype(np.int64)


def _key(epoch: Word, line: Word, seed: int) -> Word:
    return mix_bits((epoch + mix_bits((mix_bits(line) + seed) & _MASK)) & _MASK)


def _bit_lengths(sizes: Int64s) -> UInt64s:
    """Compute max(2, (size - 1).bit_length()) in two halves, because a float holds only 53 bits exactly."""
    last = sizes - 1
    high, low = np.frexp(last >> 32)[1], np.frexp(last & 0xFFFFFFFF)[1]
    lengths: UInt64s = np.maximum(np.where(high, high + 32, low), 2).astype(np.uint64)
    return lengths


def _feistel(value: Word, key: Word, bits: Word) -> Word:
    """Apply a keyed bijection of [0, 2**bits)."""
    high_bits = bits >> 1
    low_bits = bits - high_bits
    low_mask, high_mask = (1 << low_bits) - 1, (1 << high_bits) - 1
    high, low = value >> low_bits, value & low_mask
    for index, round_key in enumerate(_ROUND_KEYS):
        if index % 2:
            low = low ^ (mix_bits((high + key + round_key) & _MASK) & low_mask)
        else:
            high = high ^ (mix_bits((low + key + round_key) & _MASK) & high_mask)
    return (high << low_bits) | low


# Interleaving of several endless sequences into one, in exact shares, with random access.
#
# The merged sequence is cut into short rounds. Round e holds f(e + 1) - f(e) items of part i, f(e) = floor(e q +
# phase), so the shares stay exact; a keyed shuffle of each round gives the order of the parts. The items of each part
# keep their own order. Any position is computed directly from the closed form of f, without iteration.


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
