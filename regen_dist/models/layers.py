"""Building blocks: causal convolutions and norms, timestep conditioning, selective recomputation.

Legend: B batch, C channels, T frames, H rows, W columns.

A clip travels as `Frames`: its first frame apart from those that follow. The first frame sees nothing but itself, so it
is computed by 2D operations that are the same, call for call, whether one frame or a whole clip is given. That makes
the content latent of a clip equal to that of its first frame bit for bit, and spends no work on frames of padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint, noop_context_fn

from regen_dist.config.run import Recomputation
from regen_dist.errors import BackendError
from regen_dist.models.attention_kernels import FUSED_OPERATIONS

# Convolutions on GPUs: the cuDNN that they need, and very large tensors in strips, rows of the frame one after the
# other.
#
# Elementwise operations and matrix products split such tensors by themselves; kernels of convolutions may not, and
# some then give wrong numbers silently. Each strip is read with the rows around it that the kernel reaches, so
# the result is that of one call.

# cuDNN before 9.15 was wrong from about 1.8e9 elements on, below what 32 bits count (pytorch#163539): stay clear of it.
MOST_ELEMENTS = 3 * 2**29
STRIP_ELEMENTS = 2**30  # elements of a strip, without the rows around it
FIRST_CUDNN = 91500  # as `torch.backends.cudnn.version()` counts: 9.15.0

Convolution = Callable[[Tensor, int], Tensor]  # of a tensor, with this many rows of zeros above and below it


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
        version = "none" if found is None else f"{found // 10_000}.{found // 100 % 100}.{found % 100}"
        raise BackendError(
            f"3D convolutions in {dtype} need cuDNN 9.15 or later, found {version} (torch {torch.__version__}): "
            "before, they are wrong beyond 1.8e9 elements, or run without cuDNN, with 17 times the memory and 10 to 20 "
            f"times slower; pip install --no-deps 'nvidia-cudnn-cu{_cuda_major()}>=9.15' (conda: cudnn>=9.15), or set "
            "engine.precision=fp32"
        )


def _cuda_major() -> str:
    return (torch.version.cuda or "12").split(".")[0]


def convolve_in_strips(
    convolve: Convolution, x: Tensor, *, channels_out: int, kernel: int, stride: int, padding: int
) -> Tensor:
    """`convolve(x, padding)`, in one call where the tensor is small enough.

    Args:
        convolve: a convolution of x.
        x: [B, C, ..., H, W].
        channels_out: output channels of the convolution.
        kernel, stride, padding: sizes of the convolution along the rows.
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


class Frames(NamedTuple):
    """A clip: `first` [B, C, H, W] and `rest` [B, C, T-1, H, W], or None for an image."""

    first: Tensor
    rest: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> Frames:
        """Apply a function of single positions to both parts."""
        return Frames(function(self.first), None if self.rest is None else function(self.rest))

    def add(self, other: Frames) -> Frames:
        """Sum of two clips of one shape."""
        rest = None if self.rest is None or other.rest is None else self.rest + other.rest
        return Frames(self.first + other.first, rest)


def split_first(video: Tensor) -> Frames:
    """[B, C, T, H, W] to `Frames`."""
    return Frames(video[:, :, 0].contiguous(), video[:, :, 1:].contiguous() if video.shape[2] > 1 else None)


def join_first(frames: Frames) -> Tensor:
    """`Frames` to [B, C, T, H, W]."""
    first = frames.first.unsqueeze(2)
    return first if frames.rest is None else torch.cat([first, frames.rest], 2)


def fold_patches(frames: Frames, patch: int) -> Frames:
    """Fold patch x patch pixels into channels: C to C*patch*patch, sides divided by `patch`."""
    return frames.map(lambda x: _per_frame(x, lambda y: F.pixel_unshuffle(y, patch)))


def unfold_patches(frames: Frames, patch: int) -> Frames:
    """The inverse of `fold_patches`."""
    return frames.map(lambda x: _per_frame(x, lambda y: F.pixel_shuffle(y, patch)))


def _per_frame(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    if x.ndim == 4:
        return function(x)
    return function(x.transpose(1, 2)).transpose(1, 2)  # pixel (un)shuffle takes any leading dimensions


class ChannelNorm(nn.Module):
    """RMS norm over the channels of each position: mixes neither frames nor pixels.

    A clip is normed by one call, as an image is: ZeRO-3 gathers weights ahead by the order of calls.
    """

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels))
        self.eps = eps

    def forward(self, x: Frames | Tensor) -> Frames | Tensor:
        """Normalise a clip, or one tensor [B, C, ...]."""
        return x.map(self._normed) if isinstance(x, Frames) else self._normed(x)

    def _normed(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().square().mean(1, keepdim=True) + self.eps).to(x.dtype)  # [B, 1, ...]
        return x * scale * self.gain.view(-1, *[1] * (x.ndim - 2))


class Checkpointed(nn.Module):
    """Module that can run its parts with checkpointing: their activations are recomputed in the backward pass, all of
    them or, where it is "selective", all but attention's."""

    activation_checkpointing: Recomputation = False

    def run(self, part: nn.Module, *inputs: Any, **fixed: Any) -> Any:
        """Run `part(*inputs, **fixed)`; `fixed` holds the arguments that are no tensors."""
        if self.activation_checkpointing and torch.is_grad_enabled():
            contexts = attention_kept if self.activation_checkpointing == "selective" else noop_context_fn
            return checkpoint(part, *inputs, use_reentrant=False, context_fn=contexts, **fixed)
        return part(*inputs, **fixed)


def recompute_activations(model: nn.Module, enabled: Recomputation) -> None:
    """Recompute activations in the backward pass instead of keeping them, in every `Checkpointed` part of a model."""
    for module in model.modules():
        if isinstance(module, Checkpointed):
            module.activation_checkpointing = enabled


class ZeroLinear(nn.Linear):
    """Linear layer that starts at zero: gates and heads, which open during training.

    Every module initialises its own parameters inside its own `__init__`, because under ZeRO-3
    (`engine.partitioned_init`) they are sharded, and out of reach, as soon as that returns.
    """

    def __init__(self, features_in: int, features_out: int) -> None:
        super().__init__(features_in, features_out)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class BranchLinear(nn.Linear):
    """The last layer of a residual branch: its weights start smaller by the root of the number of branches, so that
    their sum keeps the variance of the tokens (as in GPT-2; Radford et al., 2019)."""

    def __init__(self, features_in: int, features_out: int, branches: int) -> None:
        super().__init__(features_in, features_out)
        with torch.no_grad():
            self.weight.div_(branches**0.5)


class CausalConv(nn.Conv3d):
    """3D convolution that looks back in time only; with `temporal` = 2 it folds pairs of the frames after the first.

    Args:
        kernel: 1 or 3, in time and space.
        spatial: stride in space.
        temporal: stride in time over the frames after the first; their number must be a multiple of it.
    """

    def __init__(
        self, channels_in: int, channels_out: int, kernel: int = 3, spatial: int = 1, temporal: int = 1
    ) -> None:
        pad = kernel // 2
        super().__init__(channels_in, channels_out, kernel, (temporal, spatial, spatial), (0, pad, pad))
        self._pad = pad

    def forward(self, frames: Frames) -> Frames:  # type: ignore[override]
        first = self._convolve(self._first, frames.first)
        if frames.rest is None:
            return Frames(first, None)
        return Frames(first, self._convolve(self._rest, self._prepend_past(frames)))

    def _first(self, frame: Tensor, rows: int) -> Tensor:
        """Convolve the first frame, padded with `rows` rows of zeros above and below."""
        return F.conv2d(frame, self.weight[:, :, -1], self.bias, self.stride[1:], (rows, self._pad))

    def _rest(self, frames: Tensor, rows: int) -> Tensor:
        """Convolve the frames after the first, with the frames of their past in front."""
        return F.conv3d(frames, self.weight, self.bias, self.stride, (0, rows, self._pad))

    def _convolve(self, convolution: Convolution, x: Tensor) -> Tensor:
        if x.is_cuda:
            x = channels_last(x)
        kernel, stride = self.kernel_size[1], self.stride[1]
        return convolve_in_strips(
            convolution, x, channels_out=self.out_channels, kernel=kernel, stride=stride, padding=self._pad
        )

    def _prepend_past(self, frames: Frames) -> Tensor:
        """The frames after the first, behind as many of the past (the first frame, then zeros) as the kernel reaches
        back to."""
        assert frames.rest is not None
        reach = self.kernel_size[0] - self.stride[0]
        if reach == 0:  # a pointwise convolution
            return frames.rest
        clip = torch.cat([frames.first.unsqueeze(2), frames.rest], 2)
        return F.pad(clip, (0, 0, 0, 0, reach - 1, 0)) if reach > 1 else clip


def channels_last(x: Tensor) -> Tensor:
    """Return [B, C, ...] with the channels innermost in memory, the layout that cuDNN's tensor cores read: otherwise
    every convolution would convert its input and its output. Padding, joining and norms keep it."""
    return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)


class ZeroConv(CausalConv):
    """A causal convolution that starts at zero: a head beside a linear part."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out)
        nn.init.zeros_(self.weight)
        assert self.bias is not None, "convolutions here have one"
        nn.init.zeros_(self.bias)


class CausalUpsample(nn.Module):
    """The mirror of a strided `CausalConv`: doubles the sides and, with `temporal` = 2, the frames after the first."""

    def __init__(self, channels_in: int, channels_out: int, spatial: int, temporal: int) -> None:
        super().__init__()
        self.spatial, self.temporal = spatial, temporal
        self.conv = CausalConv(channels_in, channels_out * spatial * spatial * temporal)

    def forward(self, frames: Frames) -> Frames:
        first, rest = self.conv(frames)
        first = first.chunk(self.temporal, 1)[-1]  # the first frame has no partner in time
        if rest is not None:
            rest = torch.stack(rest.chunk(self.temporal, 1), 3).flatten(
                2, 3
            )  # [B, C, T-1, H, W] -> [B, C/2, 2(T-1), H, W]
        return unfold_patches(Frames(first, rest), self.spatial)


class ResidualBlock(nn.Module):
    """Norm, SiLU, causal convolution, twice, around a skip."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm_in, self.norm_out = ChannelNorm(channels_in), ChannelNorm(channels_out)
        self.conv_in = CausalConv(channels_in, channels_out)
        self.conv_out = CausalConv(channels_out, channels_out)
        self.skip = CausalConv(channels_in, channels_out, kernel=1) if channels_in != channels_out else None

    def forward(self, frames: Frames) -> Frames:
        hidden = self.conv_in(self.norm_in(frames).map(F.silu))
        change: Frames = self.conv_out(self.norm_out(hidden).map(F.silu))
        return change.add(frames if self.skip is None else self.skip(frames))


# Timestep conditioning: adaLN-single (Peebles & Xie, 2023; Chen et al., 2024, PixArt-alpha).
#
# Legend: B batch, L tokens, D width.
NUM_FREQUENCIES = 128


class TimestepEmbedding(nn.Module):
    """The diffusion time t in (0, 1] to one modulation vector, [B] to [B, D], through sinusoids and a two-layer
    network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2 * NUM_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())

    def forward(self, t: Tensor) -> Tensor:
        steps = torch.arange(NUM_FREQUENCIES, device=t.device, dtype=torch.float32)
        frequencies = 1000.0 * torch.exp(-math.log(10000.0) / NUM_FREQUENCIES * steps)
        angles = t.float()[:, None] * frequencies
        waves = torch.cat([angles.cos(), angles.sin()], -1).to(next(self.parameters()).dtype)
        return self.net(waves)  # type: ignore[no-any-return]


class Modulation(nn.Module):
    """adaLN: the timestep's vector to `parts` vectors of width D for all blocks, [B, D] to [B, parts, D].

    One projection serves every block, and each block adds a table of its own (adaLN-single, PixArt-alpha). Zero at the
    start, so that each block begins with its own table alone: closed gates in text to video, open ones in the decoder.
    """

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.linear = ZeroLinear(width, parts * width)

    def forward(self, vector: Tensor) -> Tensor:
        return self.linear(vector).unflatten(-1, (self.parts, -1))  # type: ignore[no-any-return]


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Layer norm without parameters of its own, then scale and shift. x [B, L, D], scale and shift [B, 1, D]; or in G
    groups of tokens, [B, G, L / G, D] and [B, G, 1, D]."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:]), 1 + scale)


# Selective recomputation: a block is computed again in the backward pass, but for its attention, whose outputs are
# kept (Korthikanti et al., 2022, "Reducing Activation Recomputation in Large Transformer Models").
#
# Attention is most of a long row's operations and little of its memory: an output is as large as the block's input. An
# operation counts as attention by its name where a kernel is one operation, PyTorch's or FlashAttention's; in attention
# that is written out, as the product that follows a softmax.
#
# `torch.utils.checkpoint.create_selective_checkpoint_contexts` would do, but refuses a recomputation with an operation
# that the forward pass did not have. ZeRO-3's hooks gather weights ahead within either, as it comes; so outputs are
# matched by their order among attention's alone.


_SOFTMAX, _PRODUCT = frozenset({"aten::_softmax", "aten::_safe_softmax"}), "aten::bmm"


class _AttentionMode(TorchDispatchMode):
    """Finds the operations that are attention. `outputs` holds what they made, in order."""

    def __init__(self, outputs: list[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.outputs = outputs
        self.has_weights = False

    def is_attention(self, operation: Any) -> bool:
        """Say whether an operation's output is attention's; call it with each, in order."""
        name = operation.name().split(".")[0] if hasattr(operation, "name") else ""
        if name in _SOFTMAX:
            self.has_weights = True
        elif name == _PRODUCT and self.has_weights:
            self.has_weights = False
            return True
        return name in FUSED_OPERATIONS


class _StoreAttention(_AttentionMode):
    """Keeps attention's outputs, in the forward pass."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        if self.is_attention(function):
            # Aliases, which are no part of the graph: it would keep itself alive.
            self.outputs.append(tree_map_only(Tensor, Tensor.detach, output))
        return output


class _ReuseAttention(_AttentionMode):
    """Returns what was kept, in the recomputation."""

    def __enter__(self) -> Any:
        self.next, self.has_weights = 0, False
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.is_attention(function):
            return function(*args, **(kwargs or {}))
        kept, self.next = self.outputs[self.next], self.next + 1
        return tree_map_only(Tensor, Tensor.detach, kept)


def attention_kept() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """Return the contexts of a block's forward pass and of its recomputation (`context_fn` of
    `torch.utils.checkpoint.checkpoint`)."""
    outputs: list[Any] = []
    return _StoreAttention(outputs), _ReuseAttention(outputs)
