"""The linear code beside encoder and decoder: a truncated cosine transform at first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from regen_dist.models.embedder import Baseline, Regen, build_model
from regen_dist.models.encoder import bound_latent
from regen_dist.models.linear import TIME_MODES, content_modes, motion_modes, unbound_latent
from tests.helpers.tiny import clips, tiny_model

K = 8


def _smooth(batch: int = 2, height: int = 32, width: int = 48) -> Tensor:
    """Clips [B, 3, k+1, H, W] of slow, low waves."""
    t, y, x = torch.meshgrid(*(torch.arange(float(n)) for n in (K + 1, height, width)), indexing="ij")
    waves = [0.4 * torch.sin(0.03 * y + 0.02 * x + 0.05 * t + 2.0 * n) for n in range(3 * batch)]
    return torch.stack(waves).unflatten(0, (batch, 3))


def _model(**changes: Any) -> Regen | Baseline:
    torch.manual_seed(0)
    return build_model(tiny_model(K, **changes))


def _psnr_db(a: Tensor, b: Tensor) -> float:
    return float(10 * torch.log10(4 / (a - b).square().mean()))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["regen", "magvit2"])
def test_a_fresh_embedder_reconstructs_smooth_video(kind: str) -> None:
    """By the cosines alone: far better than repeating the first frame; from random weights there is nothing."""
    video = _smooth()
    arguments = (video, torch.randn_like(video), torch.ones(2)) if kind == "regen" else (video,)
    fresh = _psnr_db(_model(kind=kind)(*arguments)[0], video)
    assert fresh > 35
    assert fresh > 6 + _psnr_db(video[:, :, :1].expand_as(video), video)
    random = _model(kind=kind, linear_start="random")
    assert not random(*arguments)[0].any()


@torch.no_grad()
def test_the_first_frame_is_told_by_the_content_alone() -> None:
    """And so is an image, alike."""
    model, video = _model(), _smooth()
    content, motion = model.encode(video)
    first = model.linear(content, motion, torch.zeros(2, 1))
    assert torch.equal(first, model.linear(content, torch.zeros_like(motion), torch.zeros(2, 1)))
    image = model.encode(video[:, :, :1])
    assert torch.equal(image.content, content)
    assert not image.motion.any()


@torch.no_grad()
def test_times_between_frames_lie_between_them() -> None:
    """The cosines are asked for at real times."""
    model, video = _model(), _smooth()
    latents = model.encode(video)
    half = model.linear(*latents, torch.full((2, 1), 3.5))[:, :, 0]
    around = model.linear(*latents, torch.tensor([[3.0, 4.0]]).expand(2, -1))
    torch.testing.assert_close(half, around.mean(2), atol=2e-3, rtol=0)
    assert not torch.equal(around[:, :, 0], around[:, :, 1])


def test_channels_go_to_the_lowest_frequencies() -> None:
    """Every mode once, by rising frequency; those of motion are no more in time than the decoder has waves for."""
    for modes in (content_modes(40), motion_modes(40)):
        levels = [mode.level for mode in modes]
        assert levels == sorted(levels)
        assert len(set(modes)) == 40
        assert [mode.plane for mode in modes[:3]] == [0, 1, 2]
    assert {mode.time for mode in content_modes(100)} == {0}
    assert max(mode.time for mode in motion_modes(200)) < TIME_MODES


def test_bounding_can_be_undone() -> None:
    """Exactly inside the ball; on its border and beyond a finite number comes out."""
    latent = torch.randn(2, 8, 3, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(unbound_latent(bound_latent(latent)), latent, rtol=1e-4, atol=1e-5)
    assert unbound_latent(5 * latent).isfinite().all()


def test_gradients_reach_the_whole_code() -> None:
    """Encoder and decoder both learn."""
    model, video = _model(), clips(2, K + 1)
    prediction, _ = model(video, torch.randn_like(video), torch.ones(2))
    (prediction - video).square().mean().backward()
    for part in (model.linear, model.encoder.linear):
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in part.parameters())
