"""Which frames of a video become clips, and which part of them."""

from __future__ import annotations

from typing import Any

import pytest

from regen_dist.config.preencode import PreencodeConfig
from regen_dist.data.format.index import Sample
from regen_dist.errors import DataError
from regen_dist.inference.preencode_clips import cut_video


def _config(**changes: Any) -> PreencodeConfig:
    return PreencodeConfig.model_validate({"embedder": "e", "data": "d", "output": "o", "text": None} | changes)


def _sample(frames: int, height: int = 32, width: int = 32, number: int = 0) -> Sample:
    return Sample(f"v{number}", number, "s", "m", 0, 1, "", frames, height, width, 8.0, None, None, "x")


@pytest.mark.parametrize(
    ("frames", "changes", "clips", "length", "left_out"),
    [
        (5, {}, 1, 5, 0),
        (14, {}, 2, 5, 4),
        (4, {}, 0, 1, 3),
        (1, {}, 0, 1, 0),
        (9, {"stride": 2}, 1, 5, 0),  # frames 0, 2, 4, 6, 8
        (8, {"stride": 2}, 0, 1, 3),
        (20, {"max_clips": 3}, 3, 5, 5),
    ],
)
def test_a_cut(frames: int, changes: dict[str, Any], clips: int, length: int, left_out: int) -> None:
    cut = cut_video(_sample(frames), _config(**changes), 5)
    assert (cut.clips, cut.length, cut.left_out) == (clips, length, left_out)
    assert cut.frames == max(1, clips) * length


def test_the_middle_of_a_frame_is_kept() -> None:
    """Without buckets as much as fits; with buckets the frame is resized until the crop just fits."""
    cropped = cut_video(_sample(5, 50, 70), _config(), 5).geometry
    assert (cropped.crop, cropped.height, cropped.width, cropped.top, cropped.left) == ((48, 64), 50, 70, 1, 3)
    fitted = cut_video(_sample(5, 64, 96), _config(buckets=[[32, 32]]), 5).geometry
    assert (fitted.crop, fitted.height, fitted.width, fitted.top, fitted.left) == ((32, 32), 32, 48, 0, 8)
    with pytest.raises(DataError, match="15x64 is too small"):
        cut_video(_sample(5, 15, 64), _config(), 5)
