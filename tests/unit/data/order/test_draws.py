from __future__ import annotations

import pytest

from regen_dist.data.order.order import draw_clip, fit_stride
from regen_dist.errors import DataError


def test_clip_draws_depend_on_seed_epoch_and_sample_alone() -> None:
    draws = {(s, e, i): draw_clip(s, e, i, 1000, 9, (1, 2, 3)) for s in (0, 1) for e in (0, 1) for i in (5, 2**63 - 1)}
    assert len(set(draws.values())) == 8
    for (seed, epoch, sample), drawn in draws.items():
        assert draw_clip(seed, epoch, sample, 1000, 9, (1, 2, 3)) == drawn


def test_clip_draws_cover_what_is_allowed() -> None:
    draws = [draw_clip(0, 0, sample, 20, 9, (1, 2)) for sample in range(500)]
    assert {draw.start for draw in draws if draw.stride == 1} == set(range(12))
    assert {draw.start for draw in draws if draw.stride == 2} == set(range(4))
    assert 200 < sum(draw.flip for draw in draws) < 300
    assert all(0 <= draw.crop_y < 1 and 0 <= draw.crop_x < 1 for draw in draws)


def test_a_stride_that_does_not_fit_gives_way_to_the_largest_that_does() -> None:
    assert fit_stride(4, (1, 2, 4), frames=33, num_frames=9) == 4
    assert fit_stride(4, (1, 2, 4), frames=32, num_frames=9) == 2
    assert fit_stride(4, (4,), frames=30, num_frames=9) == 3
    assert fit_stride(4, (4,), frames=1, num_frames=1) == 4
    with pytest.raises(DataError, match="--min-frames 9"):
        fit_stride(1, (1,), frames=8, num_frames=9)
