"""The embedders' variants for ablations: each takes what the default takes, and learns as a whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from regen_dist.models.embedder import Baseline, Regen, build_model
from regen_dist.models.linear import LinearDecoder
from tests.helpers.tiny import clips, tiny_model, wake

VARIANTS: dict[str, dict[str, Any]] = {
    "in_context": {"conditioning__kind": "in_context"},
    "in_context_alone": {"conditioning__kind": "in_context", "decoder__linear": False},
    "learned_time": {"conditioning__time": "learned"},
    "no_linear_code": {"decoder__linear": False},
    "window": {"decoder__attention": {"pattern": "window", "window": [2, 3, 3]}},
    "no_first_frame_rule": {"conditioning__first_frame_rule": False},
    "bare": {"conditioning__time": "learned", "conditioning__first_frame_rule": False, "decoder__linear": False},
}


def _regen(name: str, *, fresh: bool = False) -> Regen:
    torch.manual_seed(0)
    model = build_model(tiny_model(**VARIANTS[name]))
    assert isinstance(model, Regen)
    if not fresh:
        wake(model)
    return model


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_any_size_and_any_times_can_be_decoded(name: str) -> None:
    """Other sides than a clip's of training, times between frames and past the end, and an image."""
    model = _regen(name)
    latents = model.encode(clips(2, 5, 24, 40))
    times = torch.tensor([0.0, 0.5, 3.0, 4.5]).expand(2, -1)
    frames = model.denoise(torch.randn(2, 3, 4, 24, 40), torch.ones(2), latents, times)
    assert frames.shape == (2, 3, 4, 24, 40)
    assert frames.dtype == torch.float32
    assert frames.isfinite().all()
    assert frames.diff(dim=2).abs().amax((0, 1, 3, 4)).min() > 1e-3  # no two of the times look alike
    image = clips(2, 1, 24, 40)
    assert model(image, torch.randn_like(image), torch.ones(2))[0].shape == image.shape


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_reach_every_parameter(name: str) -> None:
    """There is none that is built and not used, the encoder's included."""
    model, video = _regen(name), clips()
    noisy = torch.randn(video.shape, generator=torch.Generator().manual_seed(1))
    (model(video, noisy, torch.tensor([1.0, 0.4]))[0] - video).square().mean().backward()
    dead = [name for name, each in model.named_parameters() if each.grad is None or not each.grad.any()]
    assert dead == []


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_a_batch_is_its_samples(name: str) -> None:
    """Samples do not see each other, and each has times of its own."""
    model, video = _regen(name), clips()
    noisy, times, t = torch.randn(2, 3, 2, 32, 32), torch.tensor([[0.0, 1.5], [4.0, 2.0]]), torch.tensor([1.0, 0.3])
    both = model(video, noisy, t, times=times)[0]
    for one in (slice(0, 1), slice(1, 2)):
        alone = model(video[one], noisy[one], t[one], times=times[one])[0]
        torch.testing.assert_close(both[one], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["in_context_alone", "no_linear_code", "bare"])
@torch.no_grad()
def test_without_the_linear_code_a_fresh_decoder_says_zero(name: str) -> None:
    """Nothing of it is built beside the decoder; the encoder keeps its own."""
    model, video = _regen(name, fresh=True), clips()
    assert not any(isinstance(module, LinearDecoder) for module in model.modules())
    assert not any(key.startswith("linear.") for key in model.state_dict())
    prediction, latents = model(video, torch.randn_like(video), torch.ones(2))
    assert not prediction.any()
    assert latents.content.std() > 0.05


@torch.no_grad()
def test_the_baselines_linear_code_is_a_choice_too() -> None:
    """Causal convolutions alone are left, which decode clips and images."""
    torch.manual_seed(0)
    model = build_model(tiny_model(kind="magvit2", decoder__linear=False))
    assert isinstance(model, Baseline)
    assert not any(isinstance(module, LinearDecoder) for module in model.modules())
    assert not model(clips())[0].any()
    wake(model)
    for video in (clips(), clips(2, 1)):
        decoded = model(video)[0]
        assert decoded.shape == video.shape
        assert decoded.std() > 1e-3


@torch.no_grad()
def test_without_the_first_frame_rule_motion_shows_in_the_first_frame() -> None:
    """As pixels, of the decoder alone; with the rule, and one frame at a time, it does not."""
    told = {}
    for rule in (True, False):
        torch.manual_seed(0)
        model = build_model(tiny_model(conditioning__first_frame_rule=rule, decoder__linear=False))
        assert isinstance(model, Regen)
        wake(model)
        latents, noisy = model.encode(clips(1)), clips(1, 1)
        args = (noisy, torch.ones(1))
        other = latents._replace(motion=-latents.motion)
        told[rule] = [model.denoise(*args, each, torch.zeros(1, 1)) for each in (latents, other)]
    assert torch.equal(*told[True])
    assert not torch.allclose(*told[False], atol=1e-3)
