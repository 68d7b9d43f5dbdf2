"""Self-attention over a grid of video tokens (one function, four kernels, two patterns), and attention to text.

Legend: B batch, T token frames, H rows, W columns, L = T*H*W tokens, M text tokens, N heads, E width of a head.

A *backend* is the kernel; a *pattern* says which tokens see each other. A window pattern cuts the grid into boxes and
attends inside each box alone, so that the cost grows linearly with the size of the video. Odd layers shift the boxes by
half their size, so that information crosses their borders after two layers. Boxes at a border are smaller instead of
padded: no mask is needed, any backend runs.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from regen_dist.config.schema import AttentionConfig
from regen_dist.errors import BackendError
from regen_dist.models.sequence import WHOLE, Share
from regen_dist.registry import Entry, Registry

Grid = tuple[int, int, int]


class Span(NamedTuple):
    """A run of equal segments along one axis: `repeats` segments of `size` tokens from `start`."""

    start: int
    size: int
    repeats: int

    @property
    def stop(self) -> int:
        """The first token behind the run."""
        return self.start + self.size * self.repeats


def attend_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as the textbook writes it, in float32: softmax(q k^T / sqrt(E)) v. Shapes [B, N, L, E]."""
    scores = q.float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5
    mixed: Tensor = scores.softmax(-1) @ v.float()
    return mixed.to(v.dtype)


def attend_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's fused attention. Shapes [B, N, L, E]."""
    return F.scaled_dot_product_attention(q, k, v)


def attend_eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two batched matrix products around a softmax, in the working precision. Shapes [B, N, L, E].

    For small windows on CPUs whose fused kernel is slow at them: measure both (docs/performance.md).
    """
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    mixed: Tensor = scores.softmax(-1) @ v
    return mixed


def attend_flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention (package flash-attn). Shapes [B, N, L, E]; half precision on a CUDA device."""
    require_flash(q.device.type, q.dtype)
    from flash_attn import flash_attn_func

    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))  # flash-attn takes [B, L, N, E]
    return flash_attn_func(q, k, v).transpose(1, 2)  # type: ignore[no-any-return]


def require_flash(device: str, dtype: torch.dtype) -> None:
    """Say why FlashAttention cannot run here.

    Raises:
        BackendError: no CUDA device, a dtype that the kernel does not take, or no flash-attn package.
    """
    mend = "set model.decoder.attention.backend=sdpa (of text to video: model.attention.backend=sdpa)"
    if device != "cuda":
        raise BackendError(f"attention backend 'flash' needs a CUDA device, the tensors are on '{device}'; {mend}")
    if dtype not in (torch.bfloat16, torch.float16):
        raise BackendError(
            f"attention backend 'flash' needs bf16 or fp16, found {dtype}; set engine.precision=bf16, or {mend}"
        )
    try:
        import flash_attn  # noqa: F401
    except ImportError as error:
        raise BackendError(
            f"attention backend 'flash' needs the package flash-attn ({error}); install it, or {mend}"
        ) from error


def cross_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The textbook's attention to the tokens of a mask, in float32. q [B, N, L, E], k and v [B, N, M, E], mask
    [B, M]."""
    scores = q.float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5  # [B, N, L, M]
    mixed: Tensor = scores.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1) @ v.float()
    return mixed.to(v.dtype)


def cross_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """PyTorch's fused attention, which takes masks. Shapes as of `cross_reference`."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])


def cross_eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Two matrix products around a softmax, in the working precision. Shapes as of `cross_reference`."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    mixed: Tensor = scores.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1) @ v
    return mixed


def cross_flash(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """FlashAttention on the tokens of the mask alone, packed one text after the other. Shapes as of
    `cross_reference`."""
    require_flash(q.device.type, q.dtype)
    from flash_attn import flash_attn_varlen_func

    batch, _, length, _ = q.shape
    packed_k, packed_v = (tensor.transpose(1, 2)[mask] for tensor in (k, v))  # [tokens of all texts, N, E]
    starts_q = torch.arange(batch + 1, device=q.device, dtype=torch.int32) * length
    starts_k = F.pad(mask.sum(-1).cumsum(0), (1, 0)).int()
    packed_q = q.transpose(1, 2).flatten(0, 1)  # [B*L, N, E]
    mixed = flash_attn_varlen_func(packed_q, packed_k, packed_v, starts_q, starts_k, length, mask.shape[1])
    return mixed.unflatten(0, (batch, length)).transpose(1, 2)  # type: ignore[no-any-return]


class Kernels(NamedTuple):
    """One backend's functions: attention among a video's tokens, and from them to a text's."""

    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    cross: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


# `check` takes the device's type and the dtype.
BACKENDS = Registry(
    "attention.backend",
    {
        "sdpa": Entry(Kernels(attend_sdpa, cross_sdpa)),
        "eager": Entry(Kernels(attend_eager, cross_eager)),
        "flash": Entry(Kernels(attend_flash, cross_flash), require_flash),
        "reference": Entry(Kernels(attend_reference, cross_reference)),
    },
)


def cross_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, backend: str) -> Tensor:
    """Attention of a video's tokens to those of a text, of which the mask says which count.

    Args:
        q: [B, N, L, E].
        k, v: [B, N, M, E]; what they hold where the mask is False changes nothing, as long as `k` is finite.
        mask: bool [B, M], True where a token counts. A text without any gives zeros.
        backend: of `AttentionConfig`.

    Returns:
        [B, N, L, E].

    Raises:
        BackendError: the backend cannot run here.
    """
    v = v.masked_fill(~mask[:, None, :, None], 0.0)
    seen = mask | ~mask.any(-1, keepdim=True)  # a text without tokens sees its zeros: a softmax over nothing is NaN
    return BACKENDS[backend].build.cross(q, k, v, seen)


def segments(length: int, window: int, shift: int) -> list[Span]:
    """Cut an axis into windows: a first one of `shift` tokens, full ones, and what remains.

    Args:
        length: tokens along the axis.
        window: tokens of a full window.
        shift: size of the first, partial window; 0 for none.
    """
    spans, start = [], 0
    first = min(shift, length)
    if first:
        spans.append(Span(0, first, 1))
        start = first
    full = (length - start) // window
    if full:
        spans.append(Span(start, window, full))
        start += full * window
    if start < length:
        spans.append(Span(start, length - start, 1))
    return spans


def attention(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, config: AttentionConfig, shifted: bool = False, share: Share = WHOLE
) -> Tensor:
    """Self-attention of a video's tokens.

    Args:
        q, k, v: [B, N, L, E] with L = T*H*W in row-major order of `grid`; of a shared row this rank's part.
        grid: (T, H, W).
        config: backend and pattern.
        shifted: shift the windows by half their size (every other layer does).
        share: this rank's part of the row.

    Returns:
        As `q`, [B, N, L, E].

    Raises:
        BackendError: the backend cannot run here.
    """
    q, k, v = share.to_heads(q, k, v)
    return share.to_tokens(_attend_row(q, k, v, grid, config, shifted))


def _attend_row(q: Tensor, k: Tensor, v: Tensor, grid: Grid, config: AttentionConfig, shifted: bool) -> Tensor:
    """Of whole rows, by any number of heads."""
    kernel = BACKENDS[config.backend].build.attend
    if config.pattern == "full" or all(w >= g for w, g in zip(config.window, grid, strict=True)):
        return kernel(q, k, v)
    axes = [
        segments(length, window, window // 2 if shifted and window < length else 0)
        for length, window in zip(grid, config.window, strict=True)
    ]
    q, k, v = (tensor.unflatten(2, grid) for tensor in (q, k, v))  # [B, N, T, H, W, E]
    out = torch.empty_like(v)
    for box in product(*axes):
        index = (slice(None), slice(None), *(slice(span.start, span.stop) for span in box))
        windows = kernel(*(_fold(tensor[index], box) for tensor in (q, k, v)))
        out[index] = _unfold(windows, box, q.shape[0])
    return out.flatten(2, 4)


def _fold(tokens: Tensor, box: tuple[Span, ...]) -> Tensor:
    """[B, N, nt*t, nh*h, nw*w, E] to [B*nt*nh*nw, N, t*h*w, E]."""
    (nt, t), (nh, h), (nw, w) = ((span.repeats, span.size) for span in box)
    batch, heads, *_, width = tokens.shape
    tokens = tokens.reshape(batch, heads, nt, t, nh, h, nw, w, width)
    return tokens.permute(0, 2, 4, 6, 1, 3, 5, 7, 8).reshape(batch * nt * nh * nw, heads, t * h * w, width)


def _unfold(windows: Tensor, box: tuple[Span, ...], batch: int) -> Tensor:
    """The inverse of `_fold`."""
    (nt, t), (nh, h), (nw, w) = ((span.repeats, span.size) for span in box)
    heads, width = windows.shape[1], windows.shape[-1]
    windows = windows.reshape(batch, nt, nh, nw, heads, t, h, w, width)
    return windows.permute(0, 4, 1, 5, 2, 6, 3, 7, 8).reshape(batch, heads, nt * t, nh * h, nw * w, width)
