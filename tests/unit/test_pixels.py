"""Pixels between uint8 and [-1, 1]: exact, in one module, and nowhere else."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor

from regen_dist.pixels import clip_ssim, ssim_terms, to_float, to_frames, to_uint8, to_video, to_videos
from tests.unit.house.test_contracts import ROOT, _nodes, _sources

MODULE = ROOT / "regen_dist" / "pixels.py"
TRAINING = ROOT / "regen_dist" / "training"  # converts on its own until its parts are rebuilt


def _half_ranges(path: Path) -> list[int]:
    """Lines that name 127.5, by which alone uint8 becomes [-1, 1]."""
    return [node.lineno for node in _nodes(path) if isinstance(node, ast.Constant) and node.value == 127.5]


def test_pixels_are_converted_in_one_module() -> None:
    sources = [path for path in _sources() if path != MODULE and not path.is_relative_to(TRAINING)]
    found = {str(path.relative_to(ROOT)): lines for path in sources if (lines := _half_ranges(path))}
    assert found == {}, "use regen_dist.pixels"
    assert _half_ranges(MODULE), "the check finds what it looks for"


def test_every_level_survives_the_float_range() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    values = to_float(levels)
    assert (values[0], values[255], values.dtype) == (-1.0, 1.0, torch.float32)
    assert torch.equal(to_uint8(values), levels)
    assert levels.equal(torch.arange(256, dtype=torch.uint8)), "the input is not changed in place"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_rounded_to_the_nearest_and_clamped(dtype: torch.dtype) -> None:
    values = torch.tensor([-1.7, -1.0, -0.996, 0.0, 1.0, 1.7], dtype=dtype)
    assert to_uint8(values).tolist() == [0, 0, 1 if dtype == torch.float32 else 0, 128, 255, 255]


def test_frames_and_videos_are_each_others_inverse() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    video = to_video(list(frames))
    assert tuple(video.shape) == (3, 5, 4, 6)
    assert float(video[2, 3, 1, 5]) == pytest.approx(frames[3, 1, 5, 2] / 127.5 - 1, abs=1e-6)
    np.testing.assert_array_equal(to_frames(video), frames)
    assert torch.equal(to_videos([frames, frames[::-1]])[1], to_video(list(frames[::-1])))


def test_ssim_of_smooth_frames_is_exact_where_convolutions_round_to_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUs may; its variances are differences of nearly equal numbers."""
    rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    source = (0.4 + 0.2 * torch.sin(columns / 40) * torch.cos(rows / 50)).expand(1, 3, 1, 64, 64)
    made = source + 0.02 * torch.randn(source.shape, generator=torch.Generator().manual_seed(0))
    luminance, contrast = ssim_terms(
        *((video.double().flatten(0, 2)[:, None] + 1) / 2 for video in (source, made)), 1.0
    )
    exact = functional.conv2d

    def tf32(values: Tensor) -> Tensor:
        return ((values.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)  # 10 bits of the fraction stay

    monkeypatch.setattr(functional, "conv2d", lambda image, kernel: exact(tf32(image), tf32(kernel)))
    assert float(clip_ssim(source, made)) == pytest.approx(float((luminance * contrast).mean()), abs=1e-4)
