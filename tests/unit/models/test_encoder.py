"""The encoder: two latent frames, the first of which is a function of the first frame alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regen_dist.config.embedder import ModelConfig
from regen_dist.errors import DataError
from regen_dist.models import layers
from regen_dist.models.embedder import build_model
from regen_dist.models.encoder import Encoder, bound_latent
from regen_dist.models.layers import CausalConv, ChannelNorm, Frames, join_first, split_first
from tests.helpers.tiny import clips, tiny_model

KS = (4, 8, 16, 32)
SIZES = ((32, 32), (24, 40), (8, 64))


def _encoder(config: ModelConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model(config).encoder.eval()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("k", KS)
@torch.no_grad()
def test_prefix_property(k: int, size: tuple[int, int]) -> None:
    """The content latent of a clip equals, bit for bit in float32, that of its first frame alone, and no later frame
    changes it; the motion latent does see the later frames."""
    encoder = _encoder(tiny_model(k))
    clip = clips(2, k + 1, *size)
    content, motion = encoder(clip)
    assert torch.equal(content, encoder(clip[:, :, :1]).content)
    other = torch.cat([clip[:, :, :1], -clip[:, :, 1:]], 2)
    other_content, other_motion = encoder(other)
    assert torch.equal(content, other_content)
    assert not torch.allclose(motion, other_motion, atol=1e-3)
    assert not torch.allclose(content, encoder(-clip).content, atol=1e-3)


@pytest.mark.parametrize("k", KS)
@torch.no_grad()
def test_the_last_frame_reaches_the_motion_latent(k: int) -> None:
    """The second latent frame depends on all frames: changing any single one, the first and the last too, shows."""
    encoder = _encoder(tiny_model(k))
    clip = clips(1, k + 1)
    motion = encoder(clip).motion
    for frame in range(k + 1):
        changed = clip.clone()
        changed[:, :, frame] *= -1
        assert not torch.equal(motion, encoder(changed).motion), f"frame {frame} is not seen"


@pytest.mark.parametrize("kind", ["regen", "magvit2"])
@pytest.mark.parametrize("k", KS)
def test_exactly_two_latent_frames_of_eight_channels(k: int, kind: str) -> None:
    """Whatever the temporal compression, a clip has two latent frames of [8, H/8, W/8], REGEN's and the baseline's."""
    latents = _encoder(tiny_model(k, kind=kind))(clips(3, k + 1, 24, 40))
    assert len(latents) == 2
    assert latents.content.shape == latents.motion.shape == (3, 8, 3, 5)


@torch.no_grad()
def test_the_motion_latent_of_an_image_is_zero_and_of_a_clip_is_not() -> None:
    """An image is told from a clip by its motion latent: all zeros, the centre of the ball in which latents lie."""
    encoder = _encoder(tiny_model())
    assert not encoder(clips(2, 1)).motion.any()
    assert (encoder(clips(2, 5)).motion != 0).all()


@torch.no_grad()
def test_latents_are_bounded_by_construction() -> None:
    """However large the encoder's output grows in training, the RMS over a cell's channels stays below 1; small
    latents pass as they are, and a direction is never changed."""
    raw = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    for scale in (1e-3, 1.0, 3.6e4):
        latent = bound_latent(scale * raw)
        assert latent.square().mean(1).max() <= 1 + 1e-5
        torch.testing.assert_close(torch.cosine_similarity(latent, raw), torch.ones(2, 4, 4))
    torch.testing.assert_close(bound_latent(1e-3 * raw), 1e-3 * raw, rtol=1e-5, atol=0)
    model = build_model(tiny_model())
    model.encoder.head.weight.normal_(std=1e6)
    for latent in model.encode(clips()):
        assert latent.square().mean(1).max() <= 1 + 1e-5
        assert latent.square().mean() > 0.9


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 4, 32, 32), r"a clip has 5 frames \(an image 1\), found 4"),
        ((1, 3, 2, 32, 32), "found 2; cut the video into clips of 5"),
        ((1, 3, 0, 32, 32), "found 0"),
        ((1, 3, 5, 30, 32), "multiples of 8, found 30x32; pad or crop"),
        ((1, 3, 5, 32, 4), "multiples of 8, found 32x4"),
        ((1, 3, 5, 0, 32), "multiples of 8, found 0x32"),
        ((1, 4, 5, 32, 32), r"\[batch, 3, frames, height, width\], found \[1, 4, 5, 32, 32\]"),
        ((3, 5, 32, 32), r"\[batch, 3, frames, height, width\], found \[3, 5, 32, 32\]"),
    ],
)
@pytest.mark.parametrize("kind", ["regen", "magvit2"])
def test_what_does_not_fit_is_refused(shape: tuple[int, ...], message: str, kind: str) -> None:
    """A wrong frame count, side or shape gives a DataError that says what was found and what is allowed."""
    with pytest.raises(DataError, match=message):
        build_model(tiny_model(kind=kind)).encode(torch.zeros(shape))


def test_channel_norm_mixes_neither_frames_nor_positions() -> None:
    """Changing one pixel of one frame changes the normalised value of that pixel and of no other."""
    norm = ChannelNorm(6)
    x = torch.randn(2, 6, 3, 5, 7)
    changed = x.clone()
    changed[1, :, 2, 4, 0] *= 100
    different = (norm(x) != norm(changed)).any(1)
    assert not different[0].any()
    assert different.sum() <= 1
    torch.testing.assert_close(norm(x).square().mean(1), torch.ones(2, 3, 5, 7), rtol=0, atol=1e-3)


@torch.no_grad()
def test_no_operation_of_the_encoder_reaches_over_the_whole_frame() -> None:
    """A pixel outside the receptive field of the convolutions changes nothing bit for bit: no normalisation looks
    further."""
    encoder = _encoder(tiny_model())
    clip = clips(1, 5, 16, 320)
    changed = clip.clone()
    changed[..., :8] *= -1
    for before, after in zip(encoder(clip), encoder(changed), strict=True):
        assert not torch.equal(before[..., :4], after[..., :4])
        assert torch.equal(before[..., -16:], after[..., -16:])


@torch.no_grad()
def test_the_first_frame_is_part_of_the_same_convolution() -> None:
    """Computed apart, the first frame still is what one 3D convolution over a clip behind two zero frames gives."""
    torch.manual_seed(0)
    conv, video = CausalConv(2, 3), torch.randn(1, 2, 5, 4, 4)
    whole = F.conv3d(F.pad(video, (1, 1, 1, 1, 2, 0)), conv.weight, conv.bias)
    torch.testing.assert_close(join_first(conv(split_first(video))), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temporal", [1, 2])
@torch.no_grad()
def test_causal_convolution_never_looks_ahead(temporal: int) -> None:
    """Output frame i of a causal convolution changes with input frames up to its own and with none after it."""
    torch.manual_seed(0)
    conv = CausalConv(2, 3, temporal=temporal)
    video = torch.randn(1, 2, 9, 4, 4)

    def run(x: Tensor) -> Frames:
        return conv(split_first(x))

    before = run(video)
    assert before.rest is not None
    assert before.rest.shape[2] == 8 // temporal
    for frame in range(9):
        changed = video.clone()
        changed[:, :, frame] += 1
        after = run(changed)
        assert after.rest is not None
        assert torch.equal(before.first, after.first) == (frame > 0)
        same = [torch.equal(a, b) for a, b in zip(before.rest.unbind(2), after.rest.unbind(2), strict=True)]
        earliest = max(0, (frame - 1) // temporal)  # the first output that may see this frame
        assert all(same[:earliest])
        assert not same[earliest] or (frame == 0 and temporal == 2)


def test_channels_stay_innermost_from_convolution_to_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the same latents, and few inputs that must be turned around first."""
    torch.manual_seed(0)
    config = tiny_model()
    encoder, clip = Encoder(config), clips(1, config.num_frames)
    expected, turned = encoder(clip), []

    def convolve(self: layers.CausalConv, convolution: object, x: torch.Tensor) -> torch.Tensor:
        last = layers.channels_last(x)
        turned.append(last is not x)
        return layers.channels_last(original(self, convolution, last))  # as cuDNN gives it

    original = layers.CausalConv._convolve
    monkeypatch.setattr(layers.CausalConv, "_convolve", convolve)
    found = encoder(clip)
    for name in ("content", "motion"):
        assert torch.allclose(getattr(found, name), getattr(expected, name), atol=1e-5)
    assert sum(turned) <= len(turned) // 3
