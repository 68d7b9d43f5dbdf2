from __future__ import annotations

from collections import Counter

import pytest

from regen_dist.data.order.mixture import Bucket, BucketStream
from regen_dist.data.order.order import DataOrder

WIDE, TALL = Bucket(64, 96, 9), Bucket(96, 64, 9)


@pytest.mark.parametrize("size", [2, 3, 10, 64, 65])
def test_stand_ins_are_all_the_other_rows_in_turn(size: int) -> None:
    order = DataOrder([BucketStream(WIDE, (5, size))], 4, 0)
    for row in range(0, size, 7):
        first, second = (
            [order.replacement(0, 1, 3, row, attempt) for attempt in range(start, start + size - 1)]
            for start in (0, size - 1)
        )
        assert sorted(first) == sorted(second) == [other for other in range(size) if other != row]


def test_a_line_of_one_row_has_no_stand_in() -> None:
    order = DataOrder([BucketStream(WIDE, (5, 1))], 4, 0)
    assert {order.replacement(0, 1, 3, 0, attempt) for attempt in range(5)} == {0}


def test_stand_ins_depend_on_seed_line_epoch_row_and_attempt_alone() -> None:
    streams = [BucketStream(WIDE, (10**9, 10**9)), BucketStream(TALL, (10**9, 10**9))]
    one, other = DataOrder(streams, 4, 0), DataOrder(streams, 4, 1)
    places = [
        (s, d, epoch, row, attempt)
        for s in (0, 1)
        for d in (0, 1)
        for epoch in (0, 7)
        for row in (0, 5)
        for attempt in (0, 1)
    ]
    rows = [order.replacement(*place) - place[3] for order in (one, other) for place in places]
    assert len(set(rows)) == len(rows)
    again = DataOrder(streams, 64, 0, weights=(1.0, 3.0))
    assert [again.replacement(*place) for place in places] == [one.replacement(*place) for place in places]


def test_stand_ins_of_many_bad_samples_are_spread() -> None:
    order = DataOrder.single(1000, 4, 0)
    counts = Counter(order.replacement(0, 0, 0, row, 0) for row in range(1000))
    assert max(counts.values()) < 10  # 1000 draws out of 1000: 7 or more of one are already rare
