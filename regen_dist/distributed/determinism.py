"""Choice of kernels for a process: the fast ones, or those whose result is the same in every run."""

from __future__ import annotations

import os

import torch


def make_repeatable(device: torch.device, *, deterministic: bool) -> None:
    """Set up the process before its first kernel.

    On a CPU kernels are deterministic, and torch warns of one that were not. On a GPU `deterministic` restricts
    convolutions (cuDNN), matrix products (cuBLAS) and attention's backward pass (no atomic additions) to repeatable
    algorithms, and an operation that has none is an error: where torch merely warned of it, attention would stay as it
    is (aten/src/ATen/native/transformers/cuda/attention_backward.cu). Without it cuDNN tries its algorithms for each
    new shape, and keeps the fastest.

    Args:
        device: of the process.
        deterministic: `engine.deterministic`.
    """
    on_gpu = device.type == "cuda"
    if on_gpu and deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS reads it at its first call
    # Like use_deterministic_algorithms, which in addition imports the compiler to set it there.
    torch.set_deterministic_debug_mode(("error" if deterministic else "default") if on_gpu else "warn")
    torch.backends.cudnn.deterministic = on_gpu and deterministic
    torch.backends.cudnn.benchmark = on_gpu and not deterministic
