"""The perceptual distance: against the same network written with torch's layers, and files that are refused."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from regen_dist.errors import ConfigError
from regen_dist.models.perceptual import load_perceptual
from tests.helpers.networks import LAYERS, vgg_tensors, write_vgg

CPU = torch.device("cpu")


def _images(seed: int) -> Tensor:
    return torch.rand(3, 3, 16, 24, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def _reference(tensors: dict[str, Tensor], source: Tensor, made: Tensor) -> Tensor:
    """LPIPS as its paper has it, with layers of torch in the order of the numbers."""
    first, second, third = (nn.Conv2d(*LAYERS[n], 3, padding=1) for n in LAYERS)
    for number, layer in zip(LAYERS, (first, second, third), strict=True):
        layer.load_state_dict({kind: tensors[f"features.{number}.{kind}"] for kind in ("weight", "bias")})
    stages = [nn.Sequential(first, nn.ReLU()), nn.Sequential(nn.MaxPool2d(2), second, nn.ReLU(), third, nn.ReLU())]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    one, other = (((x + 1) / 2 - mean.view(3, 1, 1)) / std.view(3, 1, 1) for x in (source, made))
    total = torch.zeros(len(source))
    for number, stage in enumerate(stages):
        one, other = stage(one), stage(other)
        squares = (F.normalize(one, dim=1) - F.normalize(other, dim=1)).square()
        weight = tensors.get(f"lin{number}.model.1.weight", torch.ones(1, squares.shape[1], 1, 1))
        total += (weight * squares).sum(1).mean((1, 2))
    return total.detach()


@pytest.mark.parametrize("linear", [True, False])
def test_distance_is_that_of_the_paper(tmp_path: Path, linear: bool) -> None:
    """With LPIPS' weights of channels and without; 0 for equal images; gradients reach the made image alone."""
    save_file(tensors := vgg_tensors(linear=linear), tmp_path / "vgg.safetensors")
    network = load_perceptual(str(tmp_path / "vgg.safetensors"), CPU)
    source, made = _images(1).requires_grad_(), _images(2).requires_grad_()
    found = network.distance(source, made)
    torch.testing.assert_close(found.detach(), _reference(tensors, source, made), rtol=1e-3, atol=1e-4)
    assert found.min() > 0.1
    assert not network.distance(source, source.detach()).any()
    found.sum().backward()
    assert source.grad is None
    assert made.grad is not None
    assert made.grad.abs().sum() > 0


def test_gradients_are_finite_where_no_feature_answers(tmp_path: Path) -> None:
    """Features that are all zero have no direction."""
    tensors = {name: torch.zeros_like(x) for name, x in vgg_tensors(linear=False).items()}
    save_file(tensors, tmp_path / "vgg.safetensors")
    made = _images(2).requires_grad_()
    load_perceptual(str(tmp_path / "vgg.safetensors"), CPU).distance(_images(1), made).sum().backward()
    assert made.grad is not None
    assert made.grad.isfinite().all()


def _without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def _with(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: tensors | {name: value}


def _renamed(before: str, now: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {key.replace(before, now): value for key, value in tensors.items()}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (_renamed("features.", "encoder."), r"no tensor features\.<n>\.weight among 8"),
        (_without("features.3.bias"), r"features\.3 has no bias"),
        (_without("features.3.weight"), r"features\.3 has no weight"),
        (_with("features.3.weight", torch.zeros(16, 4, 3, 3)), r"expected \[out, 8, side, side\]"),
        (_with("features.0.weight", torch.zeros(8, 3, 2, 2)), "an odd side"),
        (_with("features.0.weight", torch.zeros(8, 3)), "expected"),
        (_renamed("features.5", "features.9"), "6 numbers on"),
        (_without("lin1.model.1.weight"), r"channel weights .* do not fit the stages' channels \[8, 16\]"),
        (_with("lin1.model.1.weight", torch.ones(1, 3, 1, 1)), "do not fit"),
        (_with("lin0.model.1.weight", -torch.ones(1, 8, 1, 1)), "negative"),
        (_with("features.0.bias", torch.full((8,), torch.nan)), "not finite"),
    ],
)
def test_other_formats_are_refused(tmp_path: Path, change: Any, found: str) -> None:
    path = tmp_path / "vgg.safetensors"
    save_file(change(vgg_tensors()), path)
    with pytest.raises(ConfigError, match=found) as caught:
        load_perceptual(str(path), CPU)
    assert "docs/losses.md" in str(caught.value)


def test_files_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    """Missing, no safetensors, of another checksum, or too deep for the crop: each with what fixes it."""
    with pytest.raises(ConfigError, match=r"cannot be read: No such file.*perceptual\.weight=0"):
        load_perceptual(str(tmp_path / "none.safetensors"), CPU)
    (tmp_path / "vgg.pth").write_bytes(b"PK\x03\x04 a pickle")
    with pytest.raises(ConfigError, match="is no safetensors file"):
        load_perceptual(str(tmp_path / "vgg.pth"), CPU)
    path = write_vgg(tmp_path / "vgg.safetensors")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert load_perceptual(str(path), CPU, sha256=digest, smallest=2).least_side == 2
    with pytest.raises(ConfigError, match=f"has the SHA-256 {digest}"):
        load_perceptual(str(path), CPU, sha256="0" * 64)
    with pytest.raises(ConfigError, match="2 stages and needs images of at least 2 pixels a side"):
        load_perceptual(str(path), CPU, smallest=1)
