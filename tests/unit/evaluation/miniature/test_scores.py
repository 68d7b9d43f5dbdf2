"""Shares, intervals, what is taken for what, and the chance level."""

from __future__ import annotations

import pytest

from regen_dist.data.synthetic.shapes import Attributes
from regen_dist.errors import DataError
from regen_dist.evaluation.miniature_scores import Fraction, confusions, derangement, missed_targets, score_arm
from regen_dist.evaluation.shapes import Reading


def _wanted(colour: str = "red", shape: str = "ring", direction: str = "up") -> Attributes:
    return Attributes(colour, shape, "small", direction, "slow", "grey")


READINGS = [
    Reading("red", "ring", "up"),
    Reading("red", "ring", "down"),
    Reading("pink", "ring", None),
    Reading(None, None, None),
]


def test_scores() -> None:
    scores = score_arm(READINGS, [_wanted()] * 4)
    assert {name: share.right for name, share in scores.items()} == {
        "colour": 2, "shape": 3, "direction": 1, "all three": 1,
    }  # fmt: skip
    assert {share.number for share in scores.values()} == {4}
    assert scores["shape"].value == 0.75


def test_each_reading_is_compared_with_its_own_caption() -> None:
    scores = score_arm(READINGS[:2], [_wanted(direction="down"), _wanted(direction="up")])
    assert (scores["shape"].right, scores["direction"].right, scores["all three"].right) == (2, 0, 0)


def test_no_videos_and_too_few_captions() -> None:
    with pytest.raises(DataError, match="no videos"):
        score_arm([], [])
    with pytest.raises(ValueError, match="shorter"):
        score_arm(READINGS, [_wanted()])


@pytest.mark.parametrize(
    ("right", "number", "low", "high"),  # all but the first from Newcombe (1998), table I, method 3
    [
        (5, 10, 0.2366, 0.7634),
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_intervals(right: int, number: int, low: float, high: float) -> None:
    assert Fraction(right, number).interval() == pytest.approx((low, high), abs=5e-5)
    mirrored = Fraction(number - right, number).interval()
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_confusions() -> None:
    found = confusions(READINGS, [_wanted(), _wanted(), _wanted("blue"), _wanted("blue")])
    assert found["colour"] == {"red": {"red": 2}, "blue": {"pink": 1, "nothing": 1}}
    assert found["direction"] == {"up": {"up": 1, "down": 1, "nothing": 2}}


@pytest.mark.parametrize("count", [2, 3, 17, 200])
def test_a_derangement_moves_everything(count: int) -> None:
    order = derangement(count)
    assert sorted(order) == list(range(count))
    assert all(place != other for place, other in enumerate(order))
    assert derangement(count) == order


def test_what_is_missed() -> None:
    good = {name: Fraction(200, 200) for name in ("colour", "shape", "direction", "all three")}
    assert missed_targets(good) == []
    assert missed_targets(good | {"shape": Fraction(170, 200)}) == []  # the target itself is enough
    assert missed_targets(good | {"shape": Fraction(169, 200)}) == ["shape 84.5%, the target is 85%"]
    assert missed_targets({name: Fraction(199, 199) for name in good}) == ["199 videos, at least 200 are asked for"]
