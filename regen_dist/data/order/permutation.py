"""Keyed permutations of [0, size) for any size: constant time and memory per element, no tables.

`mix_bits` and the Feistel network work on Python ints and on uint64 arrays alike: for the few rows of a micro-batch
ints are several times faster than arrays, for many rows arrays are faster.
"""

from __future__ import annotations

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
