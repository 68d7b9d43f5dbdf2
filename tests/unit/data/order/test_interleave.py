from __future__ import annotations

import tracemalloc
from fractions import Fraction

import numpy as np
import pytest

from regen_dist.data.order.permutation import Interleave

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
