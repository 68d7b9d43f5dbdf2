"""Layers: selective recomputation with its memory, and convolutions in strips below 32-bit counts."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from regen_dist.config.run import EngineConfig, Recomputation
from regen_dist.errors import BackendError
from regen_dist.models import attention_kernels, layers
from regen_dist.models.embedder import Baseline, build_model
from regen_dist.models.flops import count_flops, count_row_flops
from regen_dist.models.layers import CausalConv, Frames
from tests.helpers.tiny import clips, tiny_model, tiny_t2v_model, wake

WINDOW = {"pattern": "window", "window": [2, 1, 2]}
BACKENDS = ("sdpa", "eager", "reference", "flash")


@torch.library.custom_op("flash_attn::_flash_attn_forward", mutates_args=())
def _flash_forward(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """The operation of that name, [B, L, N, E]: output and weights, which its backward pass here reads."""
    weights = (torch.einsum("blne,bmne->bnlm", q, k) * q.shape[-1] ** -0.5).softmax(-1)
    return [torch.einsum("bnlm,bmne->blne", weights, v), weights]


class _Flash(torch.autograd.Function):
    """As FlashAttnFunc of the package: an operation of its own in `forward`, whose outputs it saves."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mixed, weights = torch.ops.flash_attn._flash_attn_forward(q, k, v)
        ctx.save_for_backward(q, k, v, weights)
        return mixed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            q, k, v = (each.detach().requires_grad_() for each in ctx.saved_tensors[:3])
            mixed = torch.ops.aten.scaled_dot_product_attention(*(each.transpose(1, 2) for each in (q, k, v)))
            return torch.autograd.grad(mixed.transpose(1, 2), (q, k, v), grad)


def _varlen(q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, *_: int) -> Tensor:
    bounds = zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False)
    parts = [_Flash.apply(q[None, a:b], k[None, c:d], v[None, c:d])[0] for a, b, c, d in bounds]  # type: ignore[no-untyped-call]
    return torch.cat(parts)


@pytest.fixture
def flash_on_cpus() -> Iterator[None]:
    """FlashAttention's functions, by the operation above, for CPUs."""
    package = mock.Mock(flash_attn_func=_Flash.apply, flash_attn_varlen_func=_varlen, __name__="flash_attn")
    with mock.patch.object(attention_kernels, "require_flash", return_value=package):
        yield


class Attentions(TorchDispatchMode):
    """Counts the operations of attention's forward pass: fused ones, and products of written-out attention."""

    NAMES = ("_scaled_dot_product_flash_attention_for_cpu", "_flash_attn_forward", "bmm")

    def __init__(self) -> None:
        super().__init__()
        self.count = Counter[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[str(function).split(".")[1]] += 1
        return function(*args, **(kwargs or {}))


def _case(name: str, backend: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A model with open gates, and its inputs."""
    generator = torch.Generator().manual_seed(1)
    if name == "t2v":
        model: nn.Module = build_model(tiny_t2v_model(attention__backend=backend, blocks=3))
        text, mask = torch.randn(2, 7, model.config.text_width, generator=generator), torch.ones(2, 7)  # type: ignore[union-attr]
        mask[0, 3:] = 0
        inputs: tuple[Tensor, ...] = (torch.randn(2, 8, 4, 4, 6, generator=generator), torch.ones(2) / 2, text, mask)
    else:
        pattern = WINDOW if name == "windows" else {}
        model = build_model(tiny_model(decoder__attention={"backend": backend, **pattern}))
        clip = torch.randn(2, 3, 5, 16, 24, generator=generator)
        inputs = clip, clip, torch.ones(2) / 2
    wake(model)
    return model, inputs


def _gradients(
    model: nn.Module, inputs: tuple[Tensor, ...], how: Recomputation
) -> tuple[dict[str, Tensor], Counter[str]]:
    model.set_activation_checkpointing(how)  # type: ignore[operator]
    model.zero_grad()
    output = model(*inputs)
    loss = (output[0] if isinstance(output, tuple) else output).square().mean()
    with Attentions() as again:
        loss.backward()
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}, again.count


@pytest.mark.usefixtures("flash_on_cpus")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["regen", "windows", "t2v"])
def test_gradients_are_those_without_and_attention_is_not_done_again(name: str, backend: str) -> None:
    model, inputs = _case(name, backend)
    plain, alone = _gradients(model, inputs, False)
    whole, twice = _gradients(model, inputs, True)
    kept, once = _gradients(model, inputs, "selective")
    assert plain.keys() == kept.keys() == whole.keys()
    for name, grad in plain.items():
        assert torch.equal(kept[name], whole[name]), name
        torch.testing.assert_close(kept[name], grad, rtol=1e-6, atol=1e-7)
    assert sum(each.abs().sum() for each in plain.values()) > 0
    kernel = {"sdpa": "_scaled_dot_product_flash_attention_for_cpu", "flash": "_flash_attn_forward"}.get(backend, "bmm")
    assert twice[kernel] > once[kernel]
    done_again = twice[kernel] - alone[kernel]  # written out, the scores are a product too, which is done again
    assert once[kernel] - alone[kernel] == (done_again // 2 if kernel == "bmm" else 0)


@pytest.mark.usefixtures("flash_on_cpus")
def test_a_graph_that_is_kept_can_be_gone_through_twice() -> None:
    model, inputs = _case("t2v", "sdpa")
    model.set_activation_checkpointing("selective")  # type: ignore[operator]
    loss = model(*inputs).square().mean()
    loss.backward(retain_graph=True)
    first = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    loss.backward()
    for name, each in model.named_parameters():
        if name in first:
            torch.testing.assert_close(each.grad, 2 * first[name], rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("flash_on_cpus")
def test_outputs_are_freed_with_the_graph() -> None:
    """Nothing waits for the garbage collector: on a GPU that is memory."""
    model, inputs = _case("t2v", "sdpa")
    model.set_activation_checkpointing("selective")  # type: ignore[operator]
    gc.collect()
    gc.disable()
    try:
        kept: list[weakref.ref[Tensor]] = []
        function = torch.nn.functional.scaled_dot_product_attention

        def noted(*args: Any, **kwargs: Any) -> Tensor:
            made = function(*args, **kwargs)
            kept.append(weakref.ref(made.untyped_storage()))
            return made

        with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", noted):
            loss = model(*inputs).square().mean()
            assert kept
            loss.backward()
        del loss
        assert not [each for each in kept if each() is not None]
    finally:
        gc.enable()


def _measured(model: nn.Module, inputs: tuple[Tensor, ...], how: Recomputation) -> tuple[int, int]:
    """Bytes of tensors at the peak of a forward and backward pass, and the operations that the latter does again."""
    from tools.bench.step_rank import tensor_peak

    model.set_activation_checkpointing(how)  # type: ignore[operator]
    results: list[Any] = []
    peak = tensor_peak(lambda: results.append(model(*inputs).square().mean()) or results[0].backward())
    results[0] = model(*inputs).square().mean()
    with FlopCounterMode(display=False) as counter:
        results[0].backward()
    model.set_activation_checkpointing(False)  # type: ignore[operator]
    results[0] = model(*inputs).square().mean()
    with FlopCounterMode(display=False) as plain:
        results[0].backward()
    return peak, counter.get_total_flops() - plain.get_total_flops()


@pytest.mark.usefixtures("flash_on_cpus")
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_promised_memory_and_operations_are_those_of_a_step(backend: str) -> None:
    """By the allocator's record of forward and backward pass, of a model whose activations dwarf its weights."""
    config = tiny_t2v_model(width=64, heads=2, blocks=4, attention__backend=backend)
    frames, size, tokens = 4, (32, 32), 7
    model = build_model(config)
    wake(model)
    text, mask = torch.randn(1, tokens, config.text_width), torch.ones(1, tokens)
    inputs = torch.randn(1, 8, frames, *size), torch.ones(1), text, mask
    hows: tuple[Recomputation, ...] = (True, "selective")
    found = {how: _measured(model, inputs, how) for how in hows}
    expected = {
        how: count_row_flops(config, frames, size, tokens, precision="fp32", activation_checkpointing=how)
        for how in hows
    }
    more = found["selective"][0] - found[True][0]
    assert more == pytest.approx(expected["selective"].activation_bytes - expected[True].activation_bytes, rel=0.1)
    assert found["selective"][1] == expected["selective"].recomputed_flops
    if backend == "sdpa":  # written out, attention's backward pass holds several matrices of weights for a moment
        weights = 4 * expected[True].num_parameters  # their gradients are there at the end
        assert found["selective"][0] == pytest.approx(expected["selective"].activation_bytes + weights, rel=0.1)
    else:  # a fused kernel's operations are not in PyTorch's count on CPUs
        assert found[True][1] == expected[True].recomputed_flops


@pytest.mark.usefixtures("flash_on_cpus")
def test_counts_of_a_clip_lie_between_the_other_two() -> None:
    config = tiny_model(decoder__attention={"backend": "sdpa"})
    plain, whole = (count_flops(config, (64, 64), activation_checkpointing=how) for how in (False, True))
    kept = count_flops(config, (64, 64), activation_checkpointing="selective")
    tokens, decoder = config.num_frames * 64, config.decoder
    attended = 4 * tokens**2 * decoder.width * decoder.blocks
    assert whole.recomputed_flops - kept.recomputed_flops == attended
    # Of every block in bf16, because the largest part that is recomputed is one of the encoder's, without attention.
    assert kept.activation_bytes - whole.activation_bytes == 2 * tokens * decoder.width * decoder.blocks
    assert kept.activation_bytes < plain.activation_bytes


@pytest.mark.usefixtures("flash_on_cpus")
def test_the_config_takes_old_and_new_values() -> None:
    for value in (False, True, "selective"):
        assert EngineConfig.model_validate({"activation_checkpointing": value}).activation_checkpointing == value
    with pytest.raises(ValueError, match="selective"):
        EngineConfig.model_validate({"activation_checkpointing": "some"})


# Convolutions of more elements than 32 bits count are done in strips, each small enough, with the same result.


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
    """In half precision on a GPU alone; the error says why and what to install. torch 2.10 for CUDA 12 pins 9.10."""
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(BackendError, match=rf"cuDNN 9\.15 or later, {said}.*17 times.*nvidia-cudnn-cu12>=9\.15"):
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
