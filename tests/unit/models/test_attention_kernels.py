"""Kernels of GPUs against stand-ins of their interfaces: what is called, with which arguments, on which GPU."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from regen_dist.config.embedder import AttentionConfig
from regen_dist.errors import BackendError
from regen_dist.models import attention_kernels
from regen_dist.models.attention import attention, cross_attention
from regen_dist.models.attention_kernels import attend_reference

HOPPER, AMPERE = (9, 0), (8, 0)


def _func(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As flash_attn_func of both packages: [B, L, N, E]."""
    return attend_reference(*(each.transpose(1, 2) for each in (q, k, v))).transpose(1, 2)


def _varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> Tensor:
    """As flash_attn_varlen_func of both packages, whose first arguments have this order: [tokens, N, E]."""
    for starts, longest, tokens in ((cu_seqlens_q, max_seqlen_q, q), (cu_seqlens_k, max_seqlen_k, k)):
        assert starts.dtype == torch.int32
        assert starts[0] == 0
        assert starts[-1] == len(tokens)
        assert starts.diff().max() <= longest
        assert tokens.stride(-1) == 1
    out = torch.empty_like(q)
    bounds = zip(cu_seqlens_q, cu_seqlens_q[1:], cu_seqlens_k, cu_seqlens_k[1:], strict=False)
    for q0, q1, k0, k1 in bounds:
        parts = (each.unsqueeze(0) for each in (q[q0:q1], k[k0:k1], v[k0:k1]))
        out[q0:q1] = _func(*parts)[0]
    return out


def _package(name: str, wrap: Any = lambda x: x) -> ModuleType:
    made = ModuleType(name)
    made.flash_attn_func = lambda *given: wrap(_func(*given))  # type: ignore[attr-defined]
    made.flash_attn_varlen_func = lambda *given: wrap(_varlen(*given))  # type: ignore[attr-defined]
    return made


@contextmanager
def _pretended(capability: tuple[int, int], **packages: Any) -> Iterator[None]:
    """CPU tensors count as those of a GPU of this capability; packages that are None are missing."""
    require, every = attention_kernels.require_flash, {"flash_attn": None, "flash_attn_interface": None, **packages}
    with (
        mock.patch.dict(sys.modules, every),
        mock.patch.object(attention_kernels, "_capability", return_value=capability),
        mock.patch.object(attention_kernels, "require_flash", lambda _, *rest: require("cuda", *rest)),
        mock.patch.object(attention_kernels, "_logged_kernels", set()),
    ):
        yield


TWO, THREE = _package("flash_attn"), _package("flash_attn_interface")
OLD_THREE = _package("flash_attn_interface", lambda mixed: (mixed, torch.zeros(())))  # gives the log-sums too


@pytest.mark.parametrize(
    ("capability", "packages", "runs"),
    [
        (HOPPER, {"flash_attn": TWO, "flash_attn_interface": THREE}, "flash_attn_interface"),
        (HOPPER, {"flash_attn": TWO}, "flash_attn"),
        (HOPPER, {"flash_attn_interface": OLD_THREE}, "flash_attn_interface"),
        (AMPERE, {"flash_attn": TWO, "flash_attn_interface": THREE}, "flash_attn"),
        ((10, 0), {"flash_attn": TWO, "flash_attn_interface": THREE}, "flash_attn"),
    ],
)
@pytest.mark.parametrize(("pattern", "shifted"), [("full", False), ("window", False), ("window", True)])
def test_flash_attention_takes_the_fastest_version_and_is_right(
    capability: tuple[int, int],
    packages: dict[str, Any],
    runs: str,
    pattern: str,
    shifted: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    grid = (5, 6, 7)
    q, k, v = torch.randn(3, 2, 2, 210, 8, generator=torch.Generator().manual_seed(0)).bfloat16().unbind(0)
    config = AttentionConfig.model_validate({"backend": "flash", "pattern": pattern, "window": [2, 4, 3]})
    expected = attention(q, k, v, grid, config.model_copy(update={"backend": "reference"}), shifted)
    with _pretended(capability, **packages), caplog.at_level(logging.INFO, logger=attention_kernels.__name__):
        found = [attention(q, k, v, grid, config, shifted) for _ in range(2)]
    torch.testing.assert_close(found[0], expected, rtol=1e-2, atol=1e-2)
    assert [runs in line for line in caplog.messages] == [True], "told once"


@pytest.mark.parametrize("package", [TWO, THREE], ids=["2", "3"])
def test_flash_attention_to_texts_of_many_lengths(package: ModuleType) -> None:
    mask = torch.arange(7) < torch.tensor([5, 0, 7])[:, None]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, length, 8, generator=generator).bfloat16() for length in (6, 7, 7))
    with _pretended(HOPPER, **{package.__name__: package}):
        found = cross_attention(q, k, v, mask, "flash")
    torch.testing.assert_close(found, cross_attention(q, k, v, mask, "reference"), rtol=1e-2, atol=1e-2)
    assert not found[1].any()


def test_one_call_for_all_windows() -> None:
    """Of any number of sizes: a kernel for many lengths is called once."""
    calls: list[int] = []
    package = _package("flash_attn")
    package.flash_attn_varlen_func = lambda *given: calls.append(len(given[3]) - 1) or _varlen(*given)  # type: ignore[attr-defined, func-returns-value]
    q = torch.randn(1, 2, 210, 8).bfloat16()
    config = AttentionConfig.model_validate({"backend": "flash", "pattern": "window", "window": [2, 4, 3]})
    with _pretended(AMPERE, flash_attn=package):
        attention(q, q, q, (5, 6, 7), config, shifted=True)
    assert calls == [3 * 2 * 3]


@pytest.mark.parametrize("package", [TWO, THREE], ids=["2", "3"])
@pytest.mark.parametrize(("debug_mode", "asked"), [("default", []), ("warn", []), ("error", [True] * 3)])
def test_deterministic_mode_reaches_the_backward_pass(package: ModuleType, debug_mode: Any, asked: list[bool]) -> None:
    """Of whole rows, windows and texts: by the keyword that both packages have (`deterministic`), and only in the mode
    that `engine.deterministic` sets on a GPU."""
    seen: list[bool] = []
    made = ModuleType(package.__name__)

    def flash_attn_func(*given: Any, deterministic: bool | None = None) -> Any:
        seen.extend([] if deterministic is None else [deterministic])
        return package.flash_attn_func(*given)

    def flash_attn_varlen_func(*given: Any, deterministic: bool | None = None) -> Any:
        seen.extend([] if deterministic is None else [deterministic])
        return package.flash_attn_varlen_func(*given)

    made.__dict__.update(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)
    q = torch.randn(1, 2, 210, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode(debug_mode)
    try:
        with _pretended(HOPPER, **{package.__name__: made}):
            for pattern in ("full", "window"):
                config = AttentionConfig.model_validate({"backend": "flash", "pattern": pattern, "window": [2, 4, 3]})
                attention(q, q, q, (5, 6, 7), config)
            cross_attention(q, q, q, torch.ones(1, 210, dtype=torch.bool), "flash")
    finally:
        torch.set_deterministic_debug_mode(before)
    assert seen == asked


def test_without_either_package_both_are_named() -> None:
    both = r"package flash-attn .*flash_attn_interface.*flash_attn.*; install it"
    with (
        mock.patch.dict(sys.modules, {"flash_attn": None, "flash_attn_interface": None}),
        pytest.raises(BackendError, match=both),
    ):
        attention_kernels.require_flash("cuda", torch.bfloat16, HOPPER)


@pytest.mark.parametrize("capability", [(7, 0), (7, 5)])
def test_gpus_before_ampere_are_refused(capability: tuple[int, int]) -> None:
    """The package itself would raise a RuntimeError amid the first step."""
    with _pretended(capability, flash_attn=TWO), pytest.raises(BackendError, match=r"8\.0 .*found 7\.[05]; set"):
        attention_kernels.attend_flash(*[torch.ones(1, 1, 2, 8, dtype=torch.bfloat16)] * 3)


def test_cudnn_comes_first_on_hopper() -> None:
    assert attention_kernels.sdpa_order(HOPPER)[0] == SDPBackend.CUDNN_ATTENTION
    assert attention_kernels.sdpa_order((10, 0))[0] == SDPBackend.CUDNN_ATTENTION
    assert attention_kernels.sdpa_order(AMPERE)[:2] == [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    for capability in (HOPPER, AMPERE, (7, 0)):
        assert set(attention_kernels.sdpa_order(capability)[2:]) == {SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH}


def test_the_order_is_what_pytorch_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own setting has this order while its function runs, and another one before and after."""
    seen = []

    def function(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        seen.append(torch._C._get_sdp_priority_order())
        return q

    order = attention_kernels.sdpa_order(HOPPER)
    monkeypatch.setattr(attention_kernels.F, "scaled_dot_product_attention", function)
    monkeypatch.setattr(attention_kernels, "_ordered", lambda *_: sdpa_kernel(order, set_priority=True))
    before = torch._C._get_sdp_priority_order()
    attention_kernels.attend_sdpa(*torch.zeros(3, 1, 1, 2, 4).unbind(0))
    assert seen[0][: len(order)] == [int(each) for each in order]
    assert torch._C._get_sdp_priority_order() == before != seen[0]


@pytest.mark.parametrize(
    ("taken", "name"),
    [({"cudnn", "flash"}, "cudnn"), ({"flash"}, "flash"), ({"efficient"}, "efficient"), (set(), "math")],
)
def test_the_kernel_that_is_told_is_the_first_that_takes_the_tensors(
    taken: set[str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for each in ("cudnn", "flash", "efficient"):
        monkeypatch.setattr(torch.backends.cuda, f"can_use_{each}_attention", lambda given, each=each: each in taken)
    q = torch.zeros(1, 1, 2, 8)
    assert attention_kernels.sdpa_choice(attention_kernels.sdpa_order(HOPPER), q, q, q, None) == name
