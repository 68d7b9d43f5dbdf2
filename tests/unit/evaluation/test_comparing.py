"""What got worse, what got better, and what is noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from regen_dist.errors import DataError
from tools.bench.common import ChangeKind, Figure, changes, table


def _speeds(facts: Mapping[str, Any]) -> Iterator[Figure]:
    yield Figure("clips/s", facts["rate"], True, noise=0.1)
    yield Figure("bytes", facts["bytes"], False, noise=0.0)
    if "more" in facts:
        yield Figure("more", facts["more"], True)


DECLARED = {"reading": _speeds, "other": _speeds}


def _verdicts(old: dict[str, float], new: dict[str, float]) -> dict[str, ChangeKind]:
    return {change.name: change.kind for change in changes({"reading": old}, {"reading": new}, DECLARED)}


@pytest.mark.parametrize(
    ("rate", "verdict"),
    [(89.0, ChangeKind.WORSE), (91.0, ChangeKind.SAME), (111.0, ChangeKind.SAME), (112.0, ChangeKind.BETTER)],
)
def test_a_rate_moves_by_more_than_its_noise(rate: float, verdict: ChangeKind) -> None:
    assert _verdicts({"rate": 100.0, "bytes": 5}, {"rate": rate, "bytes": 5})["clips/s"] == verdict


def test_fewer_bytes_are_better() -> None:
    for size, verdict in ((4, ChangeKind.BETTER), (5, ChangeKind.SAME), (6, ChangeKind.WORSE)):
        assert _verdicts({"rate": 1.0, "bytes": 5}, {"rate": 1.0, "bytes": size})["bytes"] == verdict


def test_a_figure_of_one_record_alone_is_told() -> None:
    found = _verdicts({"rate": 1.0, "bytes": 5}, {"rate": 1.0, "bytes": 5, "more": 1.0})
    assert found["more"] == ChangeKind.MISSING


def test_benches_of_one_record_alone_are_left_out() -> None:
    facts = {"rate": 1.0, "bytes": 5}
    assert {each.bench for each in changes({"reading": facts}, {"reading": facts, "other": facts}, DECLARED)} == {
        "reading"
    }


def test_what_got_worse_stands_first() -> None:
    found = changes({"reading": {"rate": 100.0, "bytes": 5}}, {"reading": {"rate": 120.0, "bytes": 6}}, DECLARED)
    lines = table(found).splitlines()
    assert lines[2] == "| reading | bytes | 5 | 6 | 1.2 | worse |"
    assert lines[3] == "| reading | clips/s | 100 | 120 | 1.2 | better |"


def test_records_without_a_bench_in_common_are_refused() -> None:
    with pytest.raises(DataError, match="no bench in common"):
        changes({"reading": {}}, {"other": {}}, DECLARED)


def test_a_record_of_another_shape_is_refused() -> None:
    with pytest.raises(DataError, match="'reading' is not of this version"):
        changes({"reading": {"rate": 1.0}}, {"reading": {"rate": 1.0, "bytes": 1}}, DECLARED)
