"""Causal convolutions in the working precision against float32, at the encoder's shapes and beyond the size at which a
single cuDNN call is trusted."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from regen_dist.models import layers
from regen_dist.models.layers import CausalConv, split_first
from tools.gpu_check.machine import Machine, relative_error, require_close

_DTYPE, _TOLERANCE = torch.bfloat16, 2e-2  # on the CPU too: beside float32 there would be nothing to compare


def convolutions(machine: Machine) -> dict[str, Any]:
    """Compare result and gradients at three shapes of the encoder, and the result of a very large tensor."""
    layers.require_cudnn(machine.device.type, _DTYPE)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # what is compared with is exact
    shapes = machine.size(
        ((128, 128, 17, 192, 320, 1), (128, 256, 17, 192, 320, 2), (512, 512, 9, 24, 40, 1)),
        ((8, 8, 5, 16, 24, 1), (8, 16, 5, 16, 24, 2), (16, 16, 3, 8, 8, 1)),
    )
    errors = {_name(*shape): _compare(machine, *shape) for shape in shapes}
    large, elements = _large(machine)
    worst = max([large, *(error for each in errors.values() for error in each.values())])
    return {
        "errors": errors,
        "large": {"elements": elements, "error": large},
        "summary": f"largest relative error {worst:.1e}; {elements:.2e} elements in strips",
    }


def _name(channels_in: int, channels_out: int, frames: int, height: int, width: int, stride: int) -> str:
    return f"{channels_in} to {channels_out} channels, {frames}x{height}x{width}, stride {stride}"


def _compare(
    machine: Machine, cin: int, cout: int, frames: int, height: int, width: int, stride: int
) -> dict[str, float]:
    torch.manual_seed(0)
    layer = CausalConv(cin, cout, spatial=stride, temporal=stride).to(machine.device, _DTYPE)
    video = torch.randn(1, cin, frames, height, width, device=machine.device).to(_DTYPE)
    results = []
    for each in (layer, _exact(layer)):
        x = video.detach().to(each.weight.dtype, copy=True).requires_grad_()
        first, rest = each(split_first(x))
        assert rest is not None, "a clip has frames after its first"
        (first.float().sum() + rest.float().square().sum() / rest[0, 0].numel()).backward()
        results.append((first, rest, x.grad, each.weight.grad))
    names = ("first frame", "frames after it", "gradient of the input", "gradient of the weights")
    errors = {name: relative_error(a, b) for name, a, b in zip(names, *results, strict=True)}
    for name, error in errors.items():
        require_close(f"{_name(cin, cout, frames, height, width, stride)}: {name}", error, _TOLERANCE)
    return errors


def _exact(layer: CausalConv) -> CausalConv:
    """Return a copy with the same weights in float32."""
    same = CausalConv(layer.in_channels, layer.out_channels, spatial=layer.stride[1], temporal=layer.stride[0])
    same = same.to(next(layer.parameters()).device)
    same.load_state_dict({name: weight.float() for name, weight in layer.state_dict().items()})
    return same


@torch.no_grad()
def _large(machine: Machine) -> tuple[float, int]:
    """Return the relative error of a convolution that is cut into strips, against float32 on some rows at a time."""
    channels, frames, height, width = machine.size((128, 33, 400, 1152), (8, 5, 24, 16))
    torch.manual_seed(0)
    layer = CausalConv(channels, channels).to(machine.device, _DTYPE)
    video = torch.randn(1, channels, frames, height, width, device=machine.device, dtype=_DTYPE)
    with _strips(machine):
        _, found = layer(split_first(video))
    exact, worst, rows = _exact(layer), 0.0, max(4, height // 16)
    for start in range(0, height, rows):
        worst = max(worst, _error_of_rows(exact, video, found, start, min(start + rows, height)))
    return require_close(f"{video.numel():.2e} elements", worst, _TOLERANCE), video.numel()


def _strips(machine: Machine) -> AbstractContextManager[object]:
    """Reduce the strip size on the CPU, so that the small tensor is cut too."""
    if machine.is_cuda:
        return nullcontext()
    return mock.patch.multiple(layers, MOST_ELEMENTS=4000, STRIP_ELEMENTS=2000)


def _error_of_rows(exact: CausalConv, video: Tensor, found: Tensor, start: int, stop: int) -> float:
    """Return the error of rows start..stop, which depend on one more row on either side."""
    low, high = max(start - 1, 0), min(stop + 1, video.shape[-2])
    _, expected = exact(split_first(video[..., low:high, :].float()))
    return relative_error(found[..., start:stop, :], expected[..., start - low : stop - low, :])
