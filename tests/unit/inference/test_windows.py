"""Windows cover every frame, and their weights are a partition of unity."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from regen_dist.errors import ConfigError
from regen_dist.inference.codec import blend_weights, plan_windows


@pytest.mark.parametrize(
    ("frames", "clip", "overlap", "starts"),
    [
        (1, 9, 1, [0]),
        (5, 9, 1, [0]),
        (9, 9, 1, [0]),
        (17, 9, 1, [0, 8]),
        (20, 9, 1, [0, 8, 11]),
        (18, 9, 0, [0, 9]),
        (10, 9, 4, [0, 1]),
        (19, 9, 4, [0, 5, 10]),
    ],
)
def test_plan(frames: int, clip: int, overlap: int, starts: list[int]) -> None:
    assert plan_windows(frames, clip, overlap) == starts


def test_every_frame_is_covered_and_windows_are_full() -> None:
    for clip in (5, 9, 17):
        for overlap in range(clip):
            for frames in range(1, 60):
                starts = plan_windows(frames, clip, overlap)
                covered = {frame for start in starts for frame in range(start, start + clip)}
                assert covered >= set(range(frames))
                assert starts == sorted(set(starts))
                assert frames < clip or starts[-1] + clip == frames
                assert all(b - a <= clip - overlap for a, b in pairwise(starts))


@pytest.mark.parametrize(("frames", "clip", "overlap"), [(0, 9, 1), (9, 0, 0), (30, 9, 9), (30, 9, -1)])
def test_plan_refuses(frames: int, clip: int, overlap: int) -> None:
    with pytest.raises(ConfigError, match=r"frames"):
        plan_windows(frames, clip, overlap)


@pytest.mark.parametrize("overlap", [0, 1, 2, 4, 8])
@pytest.mark.parametrize("frames", [1, 6, 9, 20, 41])
def test_weights_are_a_partition_of_unity(frames: int, overlap: int) -> None:
    starts = plan_windows(frames, 9, overlap)
    times = torch.arange(0, frames - 1 + 1e-6, 0.125, dtype=torch.float64)
    weights = blend_weights(starts, 9, times)
    assert weights.shape == (len(starts), len(times))
    torch.testing.assert_close(weights.sum(dim=0), torch.ones_like(times))
    assert (weights >= 0).all()
    for row, start in zip(weights, starts, strict=True):
        outside = (times < start) | (times > start + 8)
        if overlap > 0:
            assert (row[outside] == 0).all()


def test_one_shared_frame_is_halved() -> None:
    weights = blend_weights([0, 8], 9, torch.tensor([0.0, 7.5, 8.0, 8.5, 16.0]))
    assert weights.tolist() == [[1, 1, 0.5, 0, 0], [0, 0, 0.5, 1, 1]]


def test_ramp_is_linear_over_the_shared_frames() -> None:
    weights = blend_weights([0, 5], 9, torch.tensor([4.0, 5.0, 6.0, 7.0, 8.0, 9.0]))
    torch.testing.assert_close(weights[1], torch.tensor([0, 0.125, 0.375, 0.625, 0.875, 1]))


def test_times_beyond_the_windows_go_to_the_nearest() -> None:
    weights = blend_weights([0, 9], 9, torch.tensor([-1.0, 8.2, 8.8, 20.0]))
    assert weights.tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]


def test_integer_times_give_float_weights() -> None:
    assert blend_weights([0], 9, torch.arange(9)).dtype == torch.float32


@pytest.mark.parametrize("overlap", [0, 1, 2, 3, 8])
def test_a_fade_reaches_past_the_clips_and_stays_a_partition(overlap: int) -> None:
    starts, times = [place * (17 - overlap) for place in range(4)], torch.arange(0, 17 + 3 * (17 - overlap) - 0.9, 0.5)
    weights = blend_weights(starts, 17, times, fade=2)
    torch.testing.assert_close(weights.sum(dim=0), torch.ones(len(times)))
    largest_step = weights.diff(dim=1).abs().max()
    assert float(largest_step) <= 0.5 / 5 + 1e-6  # no faster than a ramp over five frames
    if overlap >= 5:
        torch.testing.assert_close(weights, blend_weights(starts, 17, times))  # wide enough by itself


def test_a_fade_over_one_shared_frame() -> None:
    weights = blend_weights([0, 16], 17, torch.arange(13.0, 20.0), fade=2)
    torch.testing.assert_close(weights[1], torch.tensor([0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0]))
