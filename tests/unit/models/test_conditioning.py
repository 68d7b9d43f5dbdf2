"""Latent conditioning: real-valued time, the first-frame rule."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regen_dist.models import Latents
from regen_dist.models.conditioning import LatentConditioning
from tests.helpers.tiny import tiny_model


def _conditioning(k: int = 8, rule: bool = True) -> LatentConditioning:
    torch.manual_seed(0)
    return LatentConditioning(tiny_model(k, conditioning__first_frame_rule=rule)).eval()


def _latents(seed: int = 0) -> Latents:
    generator = torch.Generator().manual_seed(seed)
    return Latents(*(torch.randn(2, 8, 3, 4, generator=generator) for _ in range(2)))


def _at(conditioning: LatentConditioning, latents: Latents, times: list[float]) -> Tensor:
    with torch.no_grad():
        return conditioning(latents, torch.tensor([times, times]))


def test_shape() -> None:
    """One embedding of the transformer's width for every latent cell and decoded frame."""
    assert _at(_conditioning(), _latents(), [0.0, 1.5, 8.0]).shape == (2, 3, 3, 4, 32)


def test_an_image_and_the_first_frame_of_a_clip_are_conditioned_alike() -> None:
    """First-frame rule: at t = 0 C_e does not depend on the motion latent, so image and clip agree; without the rule
    they do not; later frames do depend on it."""
    clip = _latents()
    image = Latents(clip.content, torch.zeros_like(clip.motion))
    ruled, free = _conditioning(rule=True), _conditioning(rule=False)
    assert torch.equal(_at(ruled, clip, [0.0]), _at(ruled, image, [0.0]))
    torch.testing.assert_close(_at(ruled, clip, [0.0, 1, 2])[:, :1], _at(ruled, image, [0.0]))
    assert not torch.allclose(_at(free, clip, [0.0]), _at(free, image, [0.0]), atol=1e-2)
    assert not torch.allclose(_at(ruled, clip, [1.0]), _at(ruled, image, [1.0]), atol=1e-2)


@pytest.mark.parametrize("moment", [0.0, 1.0, 2.5, 8.0])
def test_continuous_in_time(moment: float) -> None:
    """C_e has no jump: at the first frame, where the motion latent fades in, at frames, between and at the end."""
    conditioning, latents, step = _conditioning(), _latents(), 1e-3
    near = _at(conditioning, latents, [moment - step, moment, moment + step])
    frames = _at(conditioning, latents, [0.0, 1.0])
    frame_change = (frames[:, 1] - frames[:, 0]).abs().max()
    assert frame_change > 0.05
    assert near.diff(dim=1).abs().max() < 20 * step * frame_change


def test_times_are_coordinates_and_not_places_in_a_list() -> None:
    """Any subset of the frames, in any order, gets the rows of the full C_e."""
    conditioning, latents = _conditioning(), _latents()
    full = _at(conditioning, latents, [float(t) for t in range(9)])
    for subset in ([0, 2, 5], [7, 1], [3]):
        torch.testing.assert_close(_at(conditioning, latents, [float(t) for t in subset]), full[:, subset])


def test_samples_have_times_of_their_own() -> None:
    """Each sample of a batch is conditioned at its own times."""
    conditioning, latents = _conditioning(), _latents()
    with torch.no_grad():
        both = conditioning(latents, torch.tensor([[0.5], [6.0]]))
    torch.testing.assert_close(both[:1], _at(conditioning, latents, [0.5])[:1])
    torch.testing.assert_close(both[1:], _at(conditioning, latents, [6.0])[1:])


def test_cells_are_conditioned_by_their_own_latents_alone() -> None:
    """C_e is content-aware and local: another cell's latents do not change a cell's embedding."""
    conditioning, latents = _conditioning(), _latents()
    other = Latents(*(latent.clone() for latent in latents))
    for latent in other:
        latent[:, :, 0, 0] += 1
    different = (_at(conditioning, latents, [3.0]) - _at(conditioning, other, [3.0])).abs().amax((0, 1, 4)) > 1e-4
    assert different[0, 0]
    assert different.sum() == 1
