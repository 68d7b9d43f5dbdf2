"""Permutations and interleaving: each index once, without a table, and evenly spread."""

from __future__ import annotations

import tracemalloc
from fractions import Fraction

import numpy as np
import pytest

from regen_dist.data.order.permutation import Int64s, Interleave, combine_keys, mix_bits, permute


def epoch_rows(size: int, *, epoch: int = 0, seed: int = 0, line: int = 0) -> list[int]:
    """Rows of a whole epoch."""
    return [int(row) for row in permute(np.arange(size), np.full(size, epoch), size, seed, line)]


def one_by_one(places: Int64s, epochs: Int64s, sizes: Int64s, seed: int, lines: Int64s) -> list[int]:
    """The same through arrays of one element, which take the way of Python ints."""
    columns = zip(places, epochs, sizes, lines, strict=True)
    return [
        int(permute(np.array([p]), np.array([e]), np.array([size]), seed, np.array([line]))[0])
        for p, e, size, line in columns
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 31, 32, 33, 34, 63, 64, 65, 127, 1000, 40_000])
def test_an_epoch_is_a_permutation(size: int) -> None:
    for epoch, line in ((0, 0), (1, 0), (0, 1), (10**12, 17)):
        assert sorted(epoch_rows(size, epoch=epoch, line=line)) == list(range(size))


def test_few_and_many_elements_are_permuted_alike() -> None:
    generator = np.random.default_rng(0)
    powers = [2**bits + change for bits in (0, 1, 2, 5, 31, 32, 33, 52, 53, 54, 61) for change in (0, 1)]
    sizes = np.repeat(np.array([*powers, 3, 10**6, 2**62 - 1]), 20)
    places = np.array([generator.integers(size) for size in sizes])
    epochs, lines = generator.integers(2**62, size=len(sizes)), generator.integers(2**20, size=len(sizes))
    for seed in (0, 1, 2**63 - 1, 2**64 - 1):
        rows = permute(places, epochs, sizes, seed, lines)
        assert rows.tolist() == one_by_one(places, epochs, sizes, seed, lines)
        assert ((rows >= 0) & (rows < sizes)).all()


def test_seed_epoch_and_line_each_change_the_permutation() -> None:
    rows = [
        tuple(epoch_rows(100, epoch=epoch, seed=seed, line=line))
        for epoch in (0, 1)
        for seed in (0, 1, 2**63 - 1)
        for line in (0, 1, 2)
    ]
    assert len(set(rows)) == len(rows)


def test_each_place_gets_each_row_about_equally_often() -> None:
    size, epochs = 10, 4000
    places, numbers = np.tile(np.arange(size), epochs), np.repeat(np.arange(epochs), size)
    counts = np.zeros((size, size))
    np.add.at(counts, (places, permute(places, numbers, size, seed=3)), 1)
    chi_square = ((counts - epochs / size) ** 2 / (epochs / size)).sum()
    assert chi_square < 140  # 81 degrees of freedom: mean 81, and 99.99 % of draws below 136


def test_two_lines_of_one_size_are_independent() -> None:
    size, epochs = 10, 4000
    places, numbers = np.tile(np.arange(size), epochs), np.repeat(np.arange(epochs), size)
    first, second = (permute(places, numbers, size, seed=3, lines=line) for line in (4, 5))
    counts = np.zeros((size, size))
    np.add.at(counts, (first, second), 1)
    chi_square = ((counts - epochs / size) ** 2 / (epochs / size)).sum()
    assert chi_square < 140


def test_neighbours_are_spread_over_the_whole_line() -> None:
    rows = np.array(epoch_rows(100_000))
    assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(np.arange(100_000), rows)[0, 1]) < 0.02


def test_keys_depend_on_every_word_and_on_their_order() -> None:
    keys = [
        combine_keys(),
        combine_keys(0),
        combine_keys(0, 0),
        combine_keys(1, 0),
        combine_keys(0, 1),
        combine_keys(2**64 - 1, 5),
    ]
    assert len(set(keys)) == len(keys)
    assert all(0 <= key < 2**64 for key in keys)


def test_mixing_gives_the_same_for_an_int_and_an_array() -> None:
    words = [0, 1, 2**32, 2**63, 2**64 - 1]
    assert mix_bits(np.array(words, dtype=np.uint64)).tolist() == [mix_bits(word) for word in words]


QUOTAS = [
    (Fraction(1), Fraction(1)),
    (Fraction(7), Fraction(0), Fraction(3)),
    (Fraction(1, 7), Fraction(2, 5)),
    (Fraction(1, 1000), Fraction(0)),
    (Fraction(10**6), Fraction(1)),
    (Fraction(100_003), Fraction(29), Fraction(1, 3), Fraction(5_001)),
    tuple(Fraction(1, 2) for _ in range(40)),
    tuple(Fraction(number * number, 11) for number in range(30)),
]


@pytest.mark.parametrize("quotas", QUOTAS)
def test_every_part_comes_in_its_own_order_without_gaps(quotas: tuple[Fraction, ...]) -> None:
    parts, indexes = Interleave.of(quotas, key=5).at(0, 5000)
    for part, quota in enumerate(quotas):
        own = indexes[parts == part].tolist()
        assert own == list(range(len(own)))
        assert bool(own) == (quota > 0) or quota < sum(quotas) / 1000


@pytest.mark.parametrize("quotas", QUOTAS)
@pytest.mark.parametrize("start", [0, 123_456, 10**15])
def test_any_slice_is_the_same_as_the_whole(quotas: tuple[Fraction, ...], start: int) -> None:
    merge = Interleave.of(quotas, key=1)
    parts, indexes = merge.at(start, 2000)
    for first, count in ((0, 1), (1, 3), (254, 5), (700, 600), (1999, 1)):
        some_parts, some_indexes = merge.at(start + first, count)
        assert some_parts.tolist() == parts[first : first + count].tolist()
        assert some_indexes.tolist() == indexes[first : first + count].tolist()


@pytest.mark.parametrize("quotas", QUOTAS)
def test_shares_hold_wherever_one_looks(quotas: tuple[Fraction, ...]) -> None:
    merge = Interleave.of(quotas, key=2)
    whole = sum(quotas)
    for start in (0, 10**7, 10**15):
        parts, indexes = merge.at(start, 3000)
        for part in np.unique(parts):
            place = int(np.flatnonzero(parts == part)[0])
            wanted = (start + place) * quotas[part] / whole
            assert abs(int(indexes[place]) - wanted) <= 128 + len(quotas)


def test_whole_periods_hold_exactly_the_quotas() -> None:
    for quotas in ((7, 0, 3), (1000, 301, 9), (1, 1), (5, 2, 2, 1)):
        parts, _ = Interleave.of([Fraction(quota) for quota in quotas], key=9).at(0, 6 * sum(quotas))
        for period in np.split(parts, 6):
            assert np.bincount(period, minlength=len(quotas)).tolist() == list(quotas)


def test_rare_parts_do_not_all_come_at_once() -> None:
    parts, _ = Interleave.of([Fraction(10_000), *(Fraction(1) for _ in range(10))], key=0).at(0, 10_010)
    places = np.flatnonzero(parts)
    assert len(places) == 10
    assert np.diff(places).min() > 400  # evenly they would be 1001 apart, and a round is about 250 long


def test_a_single_part_keeps_its_positions() -> None:
    parts, indexes = Interleave.of([Fraction(0), Fraction(1, 3)], key=3).at(41, 4)
    assert parts.tolist() == [1, 1, 1, 1]
    assert indexes.tolist() == [41, 42, 43, 44]


def test_each_place_of_a_round_gets_each_part_about_equally_often() -> None:
    quotas = [Fraction(1), Fraction(3), Fraction(4)]
    rounds = 8000
    parts, _ = Interleave.of(quotas, key=7).at(0, 8 * rounds)
    counts = np.array([np.bincount(place, minlength=3) for place in parts.reshape(rounds, 8).T])
    wanted = rounds / 8 * np.array([1, 3, 4])
    chi_square = ((counts - wanted) ** 2 / wanted).sum()
    assert chi_square < 40  # 14 degrees of freedom: mean 14, and 99.99 % of draws below 40


def test_the_key_changes_the_merge_and_rounds_differ() -> None:
    first, second = (Interleave.of([Fraction(128), Fraction(128)], key).at(0, 512)[0] for key in (0, 1))
    assert first.tolist() != second.tolist()
    assert first[:256].tolist() != first[256:].tolist()


def test_what_is_returned_may_be_changed() -> None:
    merge = Interleave.of([Fraction(1), Fraction(2)], key=0)
    before = merge.at(0, 3)[1].tolist()
    merge.at(0, 3)[1][:] = -1
    assert merge.at(0, 3)[1].tolist() == before


def test_a_far_place_needs_neither_a_walk_nor_memory() -> None:
    merge = Interleave.of([Fraction(10**12), Fraction(10**9 + 7), Fraction(1, 10**9)], key=0)
    tracemalloc.start()
    merge.at(10**17 + 3, 64)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()
