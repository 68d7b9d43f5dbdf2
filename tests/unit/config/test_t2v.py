"""Values that a text-to-video run's config refuses."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from regen_dist.config.t2v import FlowConfig, T2VConfig

MINIMAL: dict[str, Any] = {"name": "x", "data": {"url": "cache"}, "train": {"steps": 1, "batch_global": 1}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": {"keep_best": 1}}, "best_metric=loss and checkpoint.best_is=min"),
        ({"model": {"width": 100, "heads": 3}}, "width 100 is not a multiple of heads 3"),
        ({"model": {"width": 12, "heads": 3}}, "heads of width 4"),
        ({"model": {"attention": {"pattern": "window"}}}, "set it to full"),
        ({"data": {"url": "cache", "clips": [2, 2]}}, "none twice"),
        ({"generation": {"embedder": "s3://bucket/model"}}, "must be a local folder"),
        ({"output": "s3://bucket/runs"}, "s3://bucket/runs is a URL, and it must be a local folder"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        T2VConfig.model_validate(MINIMAL | changes)


def test_what_is_allowed() -> None:
    config = T2VConfig.model_validate(
        MINIMAL | {"checkpoint": {"keep_best": 1, "best_metric": "loss", "best_is": "min"}}
    )
    assert config.task == "t2v"


def test_long_rows_are_shifted_towards_noise() -> None:
    """The shift grows with the root of their number of tokens."""
    flow = FlowConfig(shift=2.0, shift_tokens=100)
    assert flow.shift_at(100) == 2.0
    assert flow.shift_at(400) == pytest.approx(4.0)
