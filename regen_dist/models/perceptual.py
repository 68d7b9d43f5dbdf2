"""Networks of losses: a discriminator of videos, and the perceptual distance of images by the
features of a frozen, VGG-like network, read from a safetensors file.

LPIPS (Zhang et al., 2018): features before every pooling and at the end, each position's vector of unit length, squared
differences weighted by channel, averaged over positions and summed over stages. The file's format is that of
torchvision's VGG (`features.<n>.weight`, `features.<n>.bias`), of which the numbers alone give the network: between two
convolutions n and n + 2 lies a ReLU, between n and n + 3 a ReLU and a max pooling of 2 x 2. Weights of channels are
LPIPS' (`lin<stage>.model.1.weight`), or 1 where the file has none. Other tensors (`classifier...`) are passed over.

Legend: N images, H x W pixels, C channels of a stage.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from regen_dist.config.losses import AdversarialConfig
from regen_dist.errors import ConfigError

# What LPIPS takes from pixels in [-1, 1]: ImageNet's mean and standard deviation, in that scale.
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_EPS = 1e-8
_CONVOLUTION = re.compile(r"features\.(\d+)\.(weight|bias)")
_LINEAR = re.compile(r"lin(\d+)\.(?:model\.1\.)?weight")
_FORMAT = "the format is that of torchvision's VGG features, see docs/losses.md"


class _Layer(NamedTuple):
    """A convolution with its ReLU, and whether a stage ends there, in front of a pooling or at the end."""

    weight: Tensor
    bias: Tensor
    ends_stage: bool


class PerceptualNetwork:
    """Feature network with fixed weights, in float32.

    Args:
        layers: layers of the network, in order.
        channel_weights: [1, C, 1, 1] of each stage.
    """

    def __init__(self, layers: list[_Layer], channel_weights: list[Tensor]) -> None:
        self._layers, self._channel_weights = layers, channel_weights
        device = layers[0].weight.device
        self._shift, self._scale = (torch.tensor(x, device=device).view(1, 3, 1, 1) for x in (_SHIFT, _SCALE))

    @property
    def least_side(self) -> int:
        """Pixels that each side of an image must have: a pooling halves it, rounding down."""
        return 1 << (len(self._channel_weights) - 1)

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights."""
        return sum(4 * (layer.weight.numel() + layer.bias.numel()) for layer in self._layers)

    def activation_bytes(self, height: int, width: int) -> int:
        """Return the upper bound of the bytes that the backward pass of one image keeps: of every layer the output of
        the convolution and of the ReLU, and of a layer that ends a stage two more for its length."""
        total = 0
        for layer in self._layers:
            total += (4 if layer.ends_stage else 2) * 4 * len(layer.bias) * height * width
            if layer.ends_stage:
                height, width = height // 2, width // 2
        return total

    def distance(self, source: Tensor, made: Tensor) -> Tensor:
        """The distance of each pair of images [N, 3, H, W] in [-1, 1], [N]. Gradients go to `made` alone."""
        with torch.no_grad():
            wanted = list(self._features(source))
        total = torch.zeros(len(made), device=made.device)
        for weight, one, other in zip(self._channel_weights, wanted, self._features(made), strict=True):
            total = total + (weight * (one - other).square()).sum(1).mean((1, 2))
        return total

    def _features(self, images: Tensor) -> Iterator[Tensor]:
        """Yield the features of each stage, [N, C, h, w], of unit length at every position."""
        x = (images.float() - self._shift) / self._scale
        last = len(self._layers) - 1
        for index, layer in enumerate(self._layers):
            x = F.relu(F.conv2d(x, layer.weight, layer.bias, padding=layer.weight.shape[-1] // 2))
            if layer.ends_stage:
                yield x * torch.rsqrt(x.square().sum(1, keepdim=True) + _EPS)
                x = F.max_pool2d(x, 2) if index < last else x


def load_perceptual(
    path: str, device: torch.device, *, sha256: str | None = None, smallest: int | None = None
) -> PerceptualNetwork:
    """Read and check a feature network.

    Args:
        path: path of the safetensors file.
        device: device of the network.
        sha256: checksum of the file, if the config has it.
        smallest: shortest side of the images that it is used on, in pixels.

    Raises:
        ConfigError: there is no such file, it has another checksum, or it is not in the format.
    """
    where = f"train.losses.perceptual.network={path}"
    try:
        data = Path(os.path.expanduser(path)).read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{where} cannot be read: {error.strerror or error}; give a safetensors file ({_FORMAT}), or set "
            "train.losses.perceptual.weight=0"
        ) from error
    if sha256 is not None and (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise ConfigError(
            f"{where} has the SHA-256 {found}, train.losses.perceptual.sha256 is {sha256}; restore the file, or "
            "correct the checksum"
        )
    try:
        tensors = load(data)
    except (SafetensorError, ValueError) as error:
        raise ConfigError(f"{where} is no safetensors file ({error}); {_FORMAT}") from error
    layers, channel_weights, problem = _read(tensors)
    if problem:
        raise ConfigError(f"{where}: {problem}; {_FORMAT}")
    network = PerceptualNetwork(
        [_Layer(each.weight.to(device), each.bias.to(device), each.ends_stage) for each in layers],
        [each.to(device) for each in channel_weights],
    )
    if smallest is not None and smallest < network.least_side:
        raise ConfigError(
            f"{where} has {len(channel_weights)} stages and needs images of at least {network.least_side} pixels a "
            f"side, data.size has {smallest}; enlarge data.size, or give a network with fewer stages"
        )
    return network


def _read(tensors: dict[str, Tensor]) -> tuple[list[_Layer], list[Tensor], str]:
    """Read layers, channel weights of the stages, and their problem; empty if there is none."""
    numbers = sorted({int(match[1]) for name in tensors if (match := _CONVOLUTION.fullmatch(name))})
    if not numbers:
        return [], [], f"found no tensor features.<n>.weight among {len(tensors)} ({', '.join(sorted(tensors)[:4])})"
    layers: list[_Layer] = []
    channels = 3
    for place, number in enumerate(numbers):
        weight, bias = (tensors.get(f"features.{number}.{kind}") for kind in ("weight", "bias"))
        gap = numbers[place + 1] - number if place + 1 < len(numbers) else 0
        if problem := _layer_problem(number, weight, bias, channels, gap):
            return [], [], problem
        assert weight is not None, "what _layer_problem refuses"
        assert bias is not None, "as the weight"
        layers.append(_Layer(weight.float(), bias.float(), ends_stage=gap != 2))
        channels = len(bias)
    widths = [len(layer.bias) for layer in layers if layer.ends_stage]
    given = {int(match[1]): tensor for name, tensor in tensors.items() if (match := _LINEAR.fullmatch(name))}
    if given and (sorted(given) != list(range(len(widths))) or [given[i].numel() for i in sorted(given)] != widths):
        shapes = {f"lin{i}": list(given[i].shape) for i in sorted(given)}
        return [], [], f"channel weights {shapes} do not fit the stages' channels {widths}"
    flat = [given[i].float().view(1, -1, 1, 1) if given else torch.ones(1, n, 1, 1) for i, n in enumerate(widths)]
    finite = all(bool(x.isfinite().all()) for layer in layers for x in layer[:2]) and all(
        bool(x.isfinite().all() and (x >= 0).all()) for x in flat
    )
    return layers, flat, "" if finite else "a weight is not finite, or a channel's weight is negative"


def _layer_problem(number: int, weight: Tensor | None, bias: Tensor | None, channels: int, gap: int) -> str:
    """Return the problem of a convolution, `gap` numbers before the next (0: the last); empty if there is none."""
    if weight is None or bias is None:
        return f"features.{number} has no {'weight' if weight is None else 'bias'}"
    square = weight.ndim == 4 and weight.shape[2] == weight.shape[3] and weight.shape[2] % 2 == 1
    if not square or weight.shape[1] != channels or bias.shape != weight.shape[:1]:
        return (
            f"features.{number}.weight is {list(weight.shape)} with bias {list(bias.shape)}; expected "
            f"[out, {channels}, side, side] with an odd side, and [out]"
        )
    if gap not in (0, 2, 3):
        return (
            f"features.{number} is followed by a convolution {gap} numbers on; 2 (ReLU) or 3 (ReLU, pooling) expected"
        )
    return ""


# The 3D patch discriminator of the adversarial loss, and the losses of both sides.
#
# After PatchGAN (Isola et al., 2017) with 3D convolutions, as VidTok (Tang et al., 2024) and MAGVIT-v2 (Yu et al.,
# 2024) train video tokenizers. Its normalisation is within a sample (GroupNorm): a batch norm would let a sample's loss
# depend on the batch, and so on the number of ranks.
#
# Legend: B batch, T frames, H x W pixels; t, h, w patches; N layers.


_GROUPS = 8
_WIDEST = 8  # channels of the widest layer, in those of the first
_SLOPE = 0.2


class PatchDiscriminator(nn.Module):
    """Video in [-1, 1] to one logit a patch, high for a source: [B, 3, T, H, W] to [B, 1, t, h, w] with t = T / 2^N and
    h = H / 2^(N+1), rounded up: any size goes, single frames too."""

    def __init__(self, config: AdversarialConfig) -> None:
        super().__init__()
        channels = config.channels
        layers: list[nn.Module] = [nn.Conv3d(3, channels, 3, (1, 2, 2), 1), nn.LeakyReLU(_SLOPE)]
        for _ in range(config.layers):
            wider = min(2 * channels, _WIDEST * config.channels)
            layers += [nn.Conv3d(channels, wider, 3, 2, 1), nn.GroupNorm(_GROUPS, wider), nn.LeakyReLU(_SLOPE)]
            channels = wider
        self.layers = nn.Sequential(*layers, nn.Conv3d(channels, 1, 3, 1, 1))

    def forward(self, video: Tensor) -> Tensor:
        return self.layers(video)  # type: ignore[no-any-return]


def generator_loss(kind: str, fake: Tensor) -> Tensor:
    """The adversarial loss of each reconstruction, [B], from its logits [B, 1, t, h, w]."""
    losses = -fake if kind == "hinge" else F.softplus(-fake)
    return losses.mean((1, 2, 3, 4))


def discriminator_loss(kind: str, real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss of each pair of source and reconstruction, [B], from their logits."""
    hinge = kind == "hinge"
    losses = F.relu(1 - real) + F.relu(1 + fake) if hinge else F.softplus(-real) + F.softplus(fake)
    return losses.mean((1, 2, 3, 4))


def r1_penalty(discriminator: nn.Module, video: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of sources, and half the squared gradient of each one's mean logit by its pixels, [B], which carries
    gradients itself (Mescheder et al., 2018, Eq. 9)."""
    video = video.detach().requires_grad_()
    logits = discriminator(video)
    (slope,) = torch.autograd.grad(logits.mean((1, 2, 3, 4)).sum(), video, create_graph=True)
    return logits, 0.5 * slope.square().sum((1, 2, 3, 4))


class LogitAverages(NamedTuple):
    """Moving averages, over steps, of the logits of sources and of reconstructions."""

    real: float
    fake: float


def lecam_penalty(real: Tensor, fake: Tensor, averages: LogitAverages) -> Tensor:
    """Squared excess of each pair's logits over the other side's moving average, [B] (LeCAM; Tseng et al., 2021, in
    the form of its authors' code)."""
    excess = F.relu(real - averages.fake).square() + F.relu(averages.real - fake).square()
    return excess.mean((1, 2, 3, 4))
