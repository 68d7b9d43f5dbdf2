from __future__ import annotations

import numpy as np
import pytest

from regen_dist.data.order.permutation import Int64s, combine_keys, mix_bits, permute


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
