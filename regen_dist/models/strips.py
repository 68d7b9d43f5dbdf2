"""Convolutions of tensors with more elements than an index of 32 bits counts: rows of the frame one after the other.

Elementwise operations and matrix products split such tensors by themselves; kernels of convolutions may not, and some
then give wrong numbers without a word. Each strip is read with the rows around it that the kernel reaches, so the
result is that of one call.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_ELEMENTS = 2**31 - 1
STRIP_ELEMENTS = 2**30  # of a strip, without the rows around it

Convolution = Callable[[Tensor, int], Tensor]  # of a tensor, with so many rows of zeros above and below it


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
