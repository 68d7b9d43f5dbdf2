"""Convolutions of more elements than 32 bits count are done in strips, each small enough, with the same result."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regen_dist.errors import BackendError
from regen_dist.models import layers
from regen_dist.models.embedder import Baseline, build_model
from regen_dist.models.layers import CausalConv, Frames
from tests.helpers.tiny import clips, tiny_model, wake


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for tensors of billions of elements."""
    monkeypatch.setattr(layers, "MOST_ELEMENTS", 2000)
    monkeypatch.setattr(layers, "STRIP_ELEMENTS", 1500)


@pytest.mark.parametrize(("kernel", "spatial", "temporal"), [(3, 1, 1), (3, 2, 1), (3, 2, 2), (1, 1, 1)])
@pytest.mark.usefixtures("small_limits")
def test_strips_give_what_one_call_gives(
    kernel: int, spatial: int, temporal: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients, of the first frame and of the others, for every shape of kernel that models have."""
    torch.manual_seed(0)
    conv = CausalConv(3, 4, kernel, spatial, temporal)
    frames = Frames(torch.randn(2, 3, 26, 20, requires_grad=True), torch.randn(2, 3, 4, 26, 20, requires_grad=True))
    calls: list[int] = []
    rest = conv._rest
    monkeypatch.setattr(conv, "_rest", lambda x, rows: (calls.append(x.shape[-2]), rest(x, rows))[1])
    cut = conv(frames)
    assert len(calls) > 3
    assert max(calls) < 26
    monkeypatch.setattr(layers, "MOST_ELEMENTS", 2**31 - 1)
    whole = conv(frames)
    assert len(calls) == calls.index(26) + 1
    for part, other in zip(cut, whole, strict=True):
        torch.testing.assert_close(part, other, rtol=0, atol=1e-5)
    gradients = [torch.autograd.grad(sum(part.square().sum() for part in each), frames) for each in (cut, whole)]
    for part, other in zip(*gradients, strict=True):
        torch.testing.assert_close(part, other, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_whole_model_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoder and the baseline's decoder: what one call of each convolution gives."""
    torch.manual_seed(0)
    model = build_model(tiny_model(kind="magvit2"))
    assert isinstance(model, Baseline)
    wake(model)
    video = clips(1, 5, 64, 48)
    whole, _ = model(video)
    monkeypatch.setattr(layers, "MOST_ELEMENTS", 3000)
    monkeypatch.setattr(layers, "STRIP_ELEMENTS", 1500)
    torch.testing.assert_close(model(video)[0], whole, rtol=0, atol=1e-4)


def test_at_the_real_limit_no_call_sees_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clip of 17 frames of 1080x1920 at 128 channels, without storage: more than 2**32 elements."""
    with torch.device("meta"):
        conv, x = CausalConv(128, 128), torch.empty(1, 128, 18, 1080, 1920)
    seen: list[Tensor] = []
    rest = conv._rest
    monkeypatch.setattr(conv, "_rest", lambda x, rows: (seen.append(x), rest(x, rows))[1])
    out = conv(Frames(x[:, :, 0], x[:, :, 1:]))
    assert out.rest is not None
    assert out.rest.shape == (1, 128, 17, 1080, 1920)
    assert out.rest.numel() > 2**32
    assert len(seen) > 4
    assert all(each.numel() < 1.8e9 for each in seen)


def test_one_call_never_reaches_what_cudnn_got_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """1.9e9 elements fit 32 bits, and are beyond what cuDNN before 9.15 computed rightly: they are cut too."""
    with torch.device("meta"):
        conv, x = CausalConv(128, 128), torch.empty(1, 128, 9, 1080, 1530)
    seen: list[int] = []
    rest = conv._rest
    monkeypatch.setattr(conv, "_rest", lambda x, rows: (seen.append(x.numel()), rest(x, rows))[1])
    assert 1.8e9 < x.numel() < 2**31
    conv(Frames(x[:, :, 0], x[:, :, 1:]))
    assert len(seen) > 1
    assert max(seen) < 1.8e9


@pytest.mark.parametrize(("version", "said"), [(91002, "found 9.10.2"), (90701, "found 9.7.1"), (None, "found none")])
def test_a_cudnn_with_wrong_or_slow_convolutions_is_refused(
    monkeypatch: pytest.MonkeyPatch, version: int | None, said: str
) -> None:
    """In half precision on a GPU alone; the error says why and what to install."""
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(BackendError, match=rf"cuDNN 9\.15 or later, {said}.*17 times.*install torch>=2\.10"):
            layers.require_cudnn("cuda", dtype)
    layers.require_cudnn("cuda", torch.float32)
    layers.require_cudnn("cpu", torch.bfloat16)


def test_a_cudnn_that_is_right_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """From 9.15.0 on."""
    for version in (91500, 91501, 100100):
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda version=version: version)
        layers.require_cudnn("cuda", torch.bfloat16)


def test_an_embedder_is_not_put_on_a_gpu_with_such_a_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoding and decoding convolve as training does."""
    from regen_dist.inference.codec import PACKAGED_EMBEDDER, Codec
    from regen_dist.inference.encoder import FrozenEncoder

    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91400)
    codec = Codec.load(PACKAGED_EMBEDDER, device=torch.device("cpu"))
    half, cuda = codec.config.model_copy(update={"precision": "bf16"}), torch.device("cuda")
    for make in (lambda: Codec(codec.model, half, cuda), lambda: FrozenEncoder(codec.model.encoder, half, cuda)):
        with pytest.raises(BackendError, match=r"found 9\.14"):
            make()
