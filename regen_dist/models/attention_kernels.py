"""The kernels that compute attention, and the registry `BACKENDS` of the config's choices among them.

On a GPU: PyTorch's kernels in a fixed order, FlashAttention-3 before 2.

On Hopper cuDNN's kernel and FlashAttention-3 reach about twice the rate of FlashAttention-2 (Shah et al., 2024), and
PyTorch by itself tries FlashAttention-2 first on most builds. Each kernel that runs is logged once
(logger `regen_dist.models.attention_kernels`).
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from regen_dist.errors import BackendError
from regen_dist.registry import Entry, Registry, Site, problems

_AMPERE = 8  # major compute capability, before which FlashAttention does not run
_HOPPER = 9  # major compute capability, from which on cuDNN's kernel is the faster one
_KEY = "model.[decoder.]attention.backend"  # of an embedder with its part, of text to video without
_PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_log = logging.getLogger(__name__)
# Names of the operations that are attention as a whole: selective recomputation keeps their outputs.
FUSED_OPERATIONS = frozenset(
    {
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_fused_attention_overrideable",
        "flash_attn::_flash_attn_forward",
        "flash_attn::_flash_attn_varlen_forward",
        "flash_attn_3::_flash_attn_forward",
        "flash_attn_3::fwd",
    }
)


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


def attend_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Textbook attention in float32: softmax(q k^T / sqrt(E)) v. Shapes [B, N, L, E]."""
    scores = q.float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5
    mixed: Tensor = scores.softmax(-1) @ v.float()
    return mixed.to(v.dtype)


def attend_eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two batched matrix products around a softmax, in the working precision. Shapes [B, N, L, E].

    For small windows on CPUs whose fused kernel is slow at them: measure both (docs/performance.md).
    """
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    mixed: Tensor = scores.softmax(-1) @ v
    return mixed


class TextTokens(NamedTuple):
    """Tokens of a batch of texts that count, in the forms that kernels take: computed once for all blocks of a pass.

    Attributes:
        mask: bool [B, M], True where a token counts.
        seen: `mask`, and all of a text without any: a softmax over nothing is NaN.
        places: indices of the seen tokens in [B*M], int64; only where a kernel packs them, because a GPU makes the host
            wait for their number.
        starts: index of each text's first token in `places`, int32 [B + 1].
    """

    mask: Tensor
    seen: Tensor
    places: Tensor | None = None
    starts: Tensor | None = None


def text_tokens(mask: Tensor, backend: str) -> TextTokens:
    """Prepare a mask, bool [B, M], for `cross_attention` by a backend."""
    seen = mask | ~mask.any(-1, keepdim=True)
    if BACKENDS[backend].build.attend_packed is None:
        return TextTokens(mask, seen)
    return TextTokens(mask, seen, seen.flatten().nonzero()[:, 0], F.pad(seen.sum(-1).cumsum(0), (1, 0)).int())


def cross_reference(q: Tensor, k: Tensor, v: Tensor, text: TextTokens) -> Tensor:
    """Textbook attention to a text's tokens, in float32. q [B, N, L, E], k and v [B, N, M, E]."""
    scores = q.float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5  # [B, N, L, M]
    mixed: Tensor = scores.masked_fill(~text.seen[:, None, None], -torch.inf).softmax(-1) @ v.float()
    return mixed.to(v.dtype)


def cross_sdpa(q: Tensor, k: Tensor, v: Tensor, text: TextTokens) -> Tensor:
    """PyTorch's fused attention, which takes masks. Shapes as of `cross_reference`."""
    return attend_sdpa(q, k, v, text.seen[:, None, None])


def cross_eager(q: Tensor, k: Tensor, v: Tensor, text: TextTokens) -> Tensor:
    """Two matrix products around a softmax, in the working precision. Shapes as of `cross_reference`."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    mixed: Tensor = scores.masked_fill(~text.seen[:, None, None], -torch.inf).softmax(-1) @ v
    return mixed


def cross_flash(q: Tensor, k: Tensor, v: Tensor, text: TextTokens) -> Tensor:
    """FlashAttention on the tokens that count alone, packed one text after the other. Shapes as of
    `cross_reference`."""
    places, starts_k = text.places, text.starts
    assert places is not None, "`text_tokens` packs for this backend"
    assert starts_k is not None, "it comes with the places"
    batch, _, length, _ = q.shape
    packed_k, packed_v = (each.transpose(1, 2).flatten(0, 1).index_select(0, places) for each in (k, v))
    starts_q = torch.arange(batch + 1, device=q.device, dtype=torch.int32) * length
    packed_q = q.transpose(1, 2).flatten(0, 1)  # [B*L, N, E]
    mixed = attend_flash_lengths(packed_q, packed_k, packed_v, (starts_q, starts_k), (length, k.shape[2]))
    rows: Tensor = mixed.unflatten(0, (batch, length)).transpose(1, 2)
    return rows


class Kernels(NamedTuple):
    """One backend's functions.

    Attributes:
        attend: attention among tokens, [B, N, L, E].
        cross: attention from a video's tokens to a text's.
        attend_packed: attention of sequences of many lengths, packed one after the other; with it windows and texts are
            packed, without it windows go in groups of one shape and texts are masked.
        counted_as: the backend that counts the same operations on the meta device, where a kernel does not run there.
    """

    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    cross: Callable[[Tensor, Tensor, Tensor, TextTokens], Tensor]
    attend_packed: Callable[..., Tensor] | None = None
    counted_as: str = ""


BACKENDS = Registry(
    "attention.backend",
    {
        "sdpa": Entry(Kernels(attend_sdpa, cross_sdpa)),
        "eager": Entry(Kernels(attend_eager, cross_eager)),
        "flash": Entry(Kernels(attend_flash, cross_flash, attend_flash_lengths, counted_as="sdpa")),
        "reference": Entry(Kernels(attend_reference, cross_reference)),
    },
)
