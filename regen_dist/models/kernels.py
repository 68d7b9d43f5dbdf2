"""Choice of the kernel that computes attention on a GPU: PyTorch's kernels in a fixed order, FlashAttention-3 before 2.

On Hopper cuDNN's kernel and FlashAttention-3 reach about twice the rate of FlashAttention-2 (Shah et al., 2024), and
PyTorch by itself tries FlashAttention-2 first on most builds. Each kernel that runs is logged once
(logger `regen_dist.models.kernels`).
"""

from __future__ import annotations

import importlib
import logging
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from regen_dist.errors import BackendError
from regen_dist.registry import Site, problems

_AMPERE = 8  # major compute capability, before which FlashAttention does not run
_HOPPER = 9  # major compute capability, from which on cuDNN's kernel is the faster one
_KEY = "model.[decoder.]attention.backend"  # of an embedder with its part, of text to video without
_PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_log = logging.getLogger(__name__)


def sdpa_order(capability: tuple[int, int]) -> list[SDPBackend]:
    """PyTorch's kernels for a GPU of a compute capability, the fastest first. Each is taken where it can be."""
    fast = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    if capability[0] < _HOPPER:
        fast.reverse()
    return [*fast, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attend_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """PyTorch's fused attention. Shapes [B, N, L, E]; `mask` bool [B, N, L, M] (or broadcast): which keys count."""
    with _ordered(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _ordered(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> AbstractContextManager[object]:
    if q.device.type != "cuda":
        return nullcontext()
    order = _order_of(q.device)
    if not torch.compiler.is_compiling():
        _log_kernel("sdpa", sdpa_choice(order, q, k, v, mask), q)
    return sdpa_kernel(order, set_priority=True)


@lru_cache(maxsize=64)
def _order_of(device: torch.device) -> list[SDPBackend]:
    return sdpa_order(torch.cuda.get_device_capability(device))


def sdpa_choice(order: list[SDPBackend], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str:
    """The name of the first kernel of an order that takes these tensors, by PyTorch's own tests."""
    given = torch.backends.cuda.SDPAParams(q, k, v, mask, 0.0, False, False)
    takes = {
        SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.can_use_cudnn_attention,
        SDPBackend.FLASH_ATTENTION: torch.backends.cuda.can_use_flash_attention,
        SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.can_use_efficient_attention,
    }
    chosen = next((each for each in order if each not in takes or takes[each](given)), SDPBackend.MATH)
    return chosen.name.lower().removesuffix("_attention")


def attend_flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention (package flash-attn, or flash-attn-3). Shapes [B, N, L, E]; half precision on a CUDA device."""
    module = require_flash(q.device.type, q.dtype, _capability(q))
    _log_kernel("flash", module.__name__, q)
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))  # they take [B, L, N, E]
    return _mixed(module.flash_attn_func(q, k, v, **_repeatable())).transpose(1, 2)


def attend_flash_lengths(
    q: Tensor, k: Tensor, v: Tensor, starts: tuple[Tensor, Tensor], longest: tuple[int, int]
) -> Tensor:
    """FlashAttention of sequences of many lengths, packed one after the other.

    Args:
        q: [queries of all, N, E].
        k, v: [keys of all, N, E].
        starts: start of each sequence's queries and keys, int32 [sequences + 1] each.
        longest: queries and keys of the longest.
    """
    module = require_flash(q.device.type, q.dtype, _capability(q))
    _log_kernel("flash, many lengths", module.__name__, q)
    return _mixed(module.flash_attn_varlen_func(q, k, v, *starts, *longest, **_repeatable()))


def _repeatable() -> dict[str, bool]:
    """Return the argument that makes the backward pass add up in a fixed order (slower, and with more memory), where
    operations that are not repeatable are errors: `engine.deterministic` on a GPU. Both packages take it."""
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    return {"deterministic": True} if torch.are_deterministic_algorithms_enabled() and not warns else {}


def _mixed(found: Any) -> Tensor:
    """Return the output without the log-sums that earlier releases of FlashAttention-3 also return."""
    mixed: Tensor = found[0] if isinstance(found, tuple) else found
    return mixed


def _capability(tensor: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(tensor.device) if tensor.device.type == "cuda" else (0, 0)


def require_flash(device: str, dtype: torch.dtype, capability: tuple[int, int]) -> Any:
    """The FlashAttention that runs here: version 3 on Hopper where it is installed, else 2.

    Raises:
        BackendError: no CUDA device, one before Ampere, a dtype that the kernels do not take, or neither package.
    """
    site = Site(device, _PRECISIONS.get(dtype, str(dtype)), packages=False)  # they are tried below
    for problem in problems("attention.backend", "flash", site, _KEY):
        raise BackendError(problem)
    if capability[0] < _AMPERE:
        found = ".".join(map(str, capability))
        raise BackendError(
            f"{_KEY}=flash needs a GPU of compute capability {_AMPERE}.0 (Ampere) or later, found {found}; set "
            f"{_KEY}=sdpa"
        )
    names = ["flash_attn_interface"] * (capability[0] == _HOPPER) + ["flash_attn"]  # version 3 is Hopper's alone
    errors = []
    for name in names:
        try:
            return importlib.import_module(name)
        except ImportError as error:
            errors.append(str(error))
    raise BackendError(
        f"{_KEY}=flash needs the package flash-attn ({'; '.join(errors)}); install it, or set {_KEY}=sdpa"
    )


_logged_kernels: set[tuple[object, ...]] = set()


def _log_kernel(backend: str, kernel: str, q: Tensor) -> None:
    """Log a kernel once for each dtype and width of head."""
    key = backend, kernel, q.dtype, q.shape[-1]
    if key not in _logged_kernels:
        _logged_kernels.add(key)
        _log.info("attention: %s runs %s for %s, heads of %d", backend, kernel, q.dtype, q.shape[-1])
