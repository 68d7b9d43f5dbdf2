"""Convolutions on GPUs: the cuDNN that they need, and very large tensors in strips, rows of the frame one after the
other.

Elementwise operations and matrix products split such tensors by themselves; kernels of convolutions may not, and some
then give wrong numbers without a word. Each strip is read with the rows around it that the kernel reaches, so the
result is that of one call.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from regen_dist.errors import BackendError

# cuDNN before 9.15 was wrong from about 1.8e9 elements on, below what 32 bits count (pytorch#163539): stay clear of it.
MOST_ELEMENTS = 3 * 2**29
STRIP_ELEMENTS = 2**30  # of a strip, without the rows around it
FIRST_CUDNN = 91500  # as `torch.backends.cudnn.version()` counts: 9.15.0

Convolution = Callable[[Tensor, int], Tensor]  # of a tensor, with so many rows of zeros above and below it


def require_cudnn(device: str, dtype: torch.dtype) -> None:
    """Refuse a cuDNN whose 3D convolutions in half precision are wrong, or passed by.

    cuDNN 9.8 to 9.14 gives wrong numbers for large tensors (pytorch#163539); torch from 2.9.0 on therefore computes
    without it, with 17 times the memory and 10 to 20 times slower (pytorch#166643, #174051), unless cuDNN is 9.15 or
    later.

    Raises:
        BackendError: on a CUDA device, in bf16 or fp16, with a cuDNN before 9.15 or none.
    """
    if device != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return
    found: int | None = torch.backends.cudnn.version()
    if found is None or found < FIRST_CUDNN:
        said = "none" if found is None else f"{found // 10_000}.{found // 100 % 100}.{found % 100}"
        raise BackendError(
            f"3D convolutions in {dtype} need cuDNN 9.15 or later, found {said} (torch {torch.__version__}): before, "
            "they are wrong beyond 1.8e9 elements, or run without cuDNN, with 17 times the memory and 10 to 20 times "
            "slower; install torch>=2.10 or nvidia-cudnn>=9.15 (conda: cudnn), or set engine.precision=fp32"
        )


def convolve_in_strips(
    convolve: Convolution, x: Tensor, *, channels_out: int, kernel: int, stride: int, padding: int
) -> Tensor:
    """`convolve(x, padding)`, in one call where the tensor is small enough.

    Args:
        convolve: a convolution of x.
        x: [B, C, ..., H, W].
        channels_out: that it gives.
        kernel, stride, padding: of it along the rows.
    """
    most = max(x.numel(), x.numel() // x.shape[1] * channels_out)  # input, or output where the stride is 1
    if most <= MOST_ELEMENTS:
        return convolve(x, padding)
    rows = (x.shape[-2] + 2 * padding - kernel) // stride + 1
    of_each = max(1, rows * STRIP_ELEMENTS // most)
    strips = []
    for start in range(0, rows, of_each):
        stop = min(start + of_each, rows)
        first, last = start * stride - padding, (stop - 1) * stride - padding + kernel
        above, below = max(-first, 0), max(last - x.shape[-2], 0)
        seen = x[..., max(first, 0) : min(last, x.shape[-2]), :]
        strips.append(convolve(F.pad(seen, (0, 0, above, below)) if above or below else seen, 0))
    return torch.cat(strips, -2)
