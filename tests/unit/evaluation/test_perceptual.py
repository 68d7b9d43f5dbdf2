"""Every measure against a reference package, a published network's own form, or a case whose result is known."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.linalg import sqrtm
from torch import Tensor, nn

from regen_dist.errors import ConfigError, DataError
from regen_dist.evaluation.metrics import ssim
from regen_dist.evaluation.perceptual import (
    MS_SSIM_SIDE,
    flicker,
    frechet_distance,
    grid_energy,
    load_features,
    load_lpips,
    ms_ssim,
    segments,
)
from tests.helpers.video import moving_square

RANDOM = np.random.default_rng(0)


def noisy(frame: np.ndarray, scale: float) -> np.ndarray:
    return np.clip(frame + RANDOM.normal(0, scale, frame.shape), 0, 255).astype(np.uint8)


def as_tensor(frame: np.ndarray) -> Tensor:
    return torch.from_numpy(frame).permute(2, 0, 1)[None].float()


@pytest.mark.parametrize(("height", "width"), [(192, 256), (181, 203)])
def test_ms_ssim_and_ssim_are_those_of_pytorch_msssim(height: int, width: int) -> None:
    reference = pytest.importorskip("pytorch_msssim")
    source = moving_square(1, height, width)[0]
    for scale in (3.0, 40.0):
        other = noisy(source, scale)
        pair = as_tensor(source), as_tensor(other)
        assert ms_ssim(source, other) == pytest.approx(float(reference.ms_ssim(*pair, data_range=255)), abs=1e-5)
        assert ssim(source, other) == pytest.approx(float(reference.ssim(*pair, data_range=255)), abs=1e-4)
    assert ms_ssim(source, source) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("height", "width"), [(11, 11), (64, 96), (181, 203)])
def test_ssim_is_that_of_scikit_image(height: int, width: int) -> None:
    """It filters with a reflected edge and then crops it, so both average the same positions."""
    reference = pytest.importorskip("skimage.metrics").structural_similarity
    source = RANDOM.integers(0, 256, (height, width, 3)).astype(np.uint8)
    for other in (noisy(source, 3.0), noisy(source, 60.0), 255 - source):
        expected = reference(
            source, other, data_range=255, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert ssim(source, other) == pytest.approx(expected, abs=1e-12)


def test_ms_ssim_needs_its_scales() -> None:
    small = np.zeros((MS_SSIM_SIDE - 1, 400, 3), np.uint8)
    assert ms_ssim(small, small) is None
    assert ms_ssim(np.zeros((MS_SSIM_SIDE, MS_SSIM_SIDE, 3), np.uint8), np.zeros((161, 161, 3), np.uint8)) is not None


def test_flicker_is_the_change_of_the_error() -> None:
    source = moving_square(2, 32, 32) // 2
    still = source + np.uint8(20)
    assert flicker((source[0], source[1]), (still[0], still[1])) == 0
    assert flicker((source[0], source[1]), (still[0], source[1] + np.uint8(13))) == 7


def test_grid_energy_finds_cells_of_its_period_alone() -> None:
    source = np.full((64, 96, 3), 100, np.uint8)
    cells = RANDOM.integers(0, 100, (8, 12, 3)).astype(np.uint8)
    blocks = np.kron(cells, np.ones((8, 8, 1), np.uint8))
    assert grid_energy(source, source + blocks, 8) == 1
    noise = RANDOM.integers(0, 100, (64, 96, 3)).astype(np.uint8)
    assert grid_energy(source, source + noise, 8) == pytest.approx(0.5, abs=0.02)
    assert grid_energy(source, source + np.roll(blocks, 4, (0, 1)), 8) == 0
    assert grid_energy(source, source + np.uint8(9), 8) is None


def test_frechet_is_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(90, 7, generator=generator)
    b = 1.5 * torch.randn(70, 7, generator=generator) + torch.linspace(0, 1, 7)
    cov_a, cov_b = (np.cov(each.double().numpy().T) for each in (a, b))
    means = np.sum((a.double().mean(0) - b.double().mean(0)).numpy() ** 2)
    expected = means + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_equal_sets_are_at_no_distance_and_a_shift_is_its_square() -> None:
    """With fewer samples than features, too."""
    a = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + 0.5) == pytest.approx(40 * 0.25, rel=1e-5)
    with pytest.raises(DataError, match="at least two"):
        frechet_distance(torch.ones(1, 3), torch.ones(4, 3))


# LPIPS: the package's network, written as its source has it (modules in `slice1` … `slice5`), with random weights.


def lpips_net(kind: str) -> nn.Module:
    """AlexNet's or VGG-16's features by torchvision's numbering, in the package's slices, and its linear layers."""
    if kind == "alex":
        layers = [
            nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, 1, 2), nn.ReLU(),
            nn.MaxPool2d(3, 2), nn.Conv2d(192, 384, 3, 1, 1), nn.ReLU(), nn.Conv2d(384, 256, 3, 1, 1), nn.ReLU(),
            nn.Conv2d(256, 256, 3, 1, 1), nn.ReLU(),
        ]  # fmt: skip
        ends, widths = (2, 5, 8, 10, 12), (64, 192, 384, 256, 256)
    else:
        layers, last = [], 3
        for width in (8, 8, "M", 16, 16, "M", 24, 24, 24, "M", 32, 32, 32, "M", 32, 32, 32):  # narrower than VGG's
            layers += [nn.MaxPool2d(2, 2)] if width == "M" else [nn.Conv2d(last, width, 3, 1, 1), nn.ReLU()]  # type: ignore[arg-type]
            last = last if width == "M" else width  # type: ignore[assignment]
        ends, widths = (4, 9, 16, 23, 30), (8, 16, 24, 32, 32)
    net = nn.Module()
    for number, (start, end) in enumerate(zip((0, *ends), ends, strict=False), 1):
        part = nn.Sequential()
        for index in range(start, end):
            part.add_module(str(index), layers[index])
        net.add_module(f"slice{number}", part)
    whole = nn.Module()
    whole.add_module("net", net)
    for number, width in enumerate(widths):
        lin = nn.Module()
        lin.add_module("model", nn.Sequential(nn.Dropout(), nn.Conv2d(width, 1, 1, bias=False)))
        whole.add_module(f"lin{number}", lin)
    return whole.eval()


@torch.no_grad()
def lpips_of(whole: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    """Equation 1 of Zhang et al., 2018, one position at a time."""
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x, y = ((each - shift[:, None, None]) / scale[:, None, None] for each in (a, b))
    total = torch.zeros(len(a))
    for number in range(5):
        x, y = (whole.get_submodule(f"net.slice{number + 1}")(each) for each in (x, y))
        unit = [nn.functional.normalize(each, dim=1) for each in (x, y)]
        weight = whole.get_parameter(f"lin{number}.model.1.weight").flatten()
        total += torch.einsum("nchw,c->nhw", (unit[0] - unit[1]) ** 2, weight).mean((1, 2))
    return total


@pytest.mark.parametrize("kind", ["alex", "vgg"])
@pytest.mark.parametrize("lin", ["lin", "lins."])
def test_lpips_of_safetensors_is_the_packages_network(kind: str, lin: str, tmp_path: Path) -> None:
    """The package holds its linear layers as `lin0` and as `lins.0`; `save_model` keeps one of the names."""
    torch.manual_seed(0)
    whole = lpips_net(kind)
    weights = {re.sub(r"^lin(\d)", rf"{lin}\1", name): each for name, each in whole.state_dict().items()}
    save_file(weights, tmp_path / "lpips.safetensors")
    a, b = torch.rand(2, 2, 3, 72, 80) * 2 - 1
    network = load_lpips(tmp_path / "lpips.safetensors")
    assert network.call(a, b).tolist() == pytest.approx(lpips_of(whole, a, b).tolist(), rel=1e-4)
    assert network.call(a, a).tolist() == [0, 0]
    assert network.name.startswith("lpips.safetensors, SHA-256 ")


class Squared(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().mean((1, 2, 3), keepdim=True)


def test_lpips_by_torchscript(tmp_path: Path) -> None:
    torch.jit.script(Squared()).save(str(tmp_path / "net.pt"))
    found = load_lpips(tmp_path / "net.pt").call(torch.ones(2, 3, 8, 8), torch.zeros(2, 3, 8, 8))
    assert found.tolist() == [1, 1]


def test_other_files_are_refused_and_nothing_is_unpickled(tmp_path: Path) -> None:
    save_file({"conv.weight": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(DataError, match="found 0 convolutions"):
        load_lpips(tmp_path / "other.safetensors")
    torch.save({"weight": torch.ones(1)}, tmp_path / "pickled.pt")
    for load in (load_lpips, lambda path: load_features(path, video=True)):
        with pytest.raises(DataError, match="no TorchScript file"):
            load(tmp_path / "pickled.pt")
        with pytest.raises(ConfigError, match="no weights at"):
            load(tmp_path / "missing.pt")


class VideoFeatures(nn.Module):
    """Called as the I3D of StyleGAN-V is: without `return_features` it would give classes."""

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        if not (rescale and resize and return_features):
            return torch.zeros(len(x), 400)
        return torch.cat([x.mean((2, 3, 4)), x.diff(dim=2).abs().mean((2, 3, 4))], 1)


def test_features_of_video_by_torchscript(tmp_path: Path) -> None:
    torch.jit.script(VideoFeatures()).save(str(tmp_path / "i3d.pt"))
    frames = list(moving_square(20, 16, 24))
    pixels = segments(frames, 8)
    assert pixels.shape == (2, 3, 8, 16, 24)
    assert torch.equal(pixels[1, :, 3], as_tensor(frames[11])[0])
    found = load_features(tmp_path / "i3d.pt", video=True).call(pixels)
    assert found.shape == (2, 6)
    assert found[0, :3].tolist() == pytest.approx(np.stack(frames[:8]).mean((0, 1, 2)).tolist(), rel=1e-4)


def test_features_of_transformers_folders(tmp_path: Path) -> None:
    """Pixels are brought to the model's size, mean and deviation; a network of frames is no network of video."""
    from transformers import VideoMAEConfig, VideoMAEModel, ViTConfig, ViTModel

    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    video = VideoMAEModel(VideoMAEConfig(image_size=32, patch_size=16, num_frames=4, **small)).eval()
    image = ViTModel(ViTConfig(image_size=32, patch_size=16, **small)).eval()
    video.save_pretrained(tmp_path / "video")
    image.save_pretrained(tmp_path / "image")
    (tmp_path / "image" / "preprocessor_config.json").write_text(
        '{"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.2, 0.2]}'
    )
    pixels = torch.randint(0, 256, (3, 3, 4, 32, 32)).float()
    network = load_features(tmp_path / "video", video=True)
    assert network.segment_frames == 4
    with torch.no_grad():
        expected = video(pixel_values=pixels.transpose(1, 2) / 127.5 - 1).last_hidden_state.mean(1)
        mean = torch.tensor([0.4, 0.5, 0.6])[:, None, None]
        of_image = image(pixel_values=(pixels[:, :, 0] / 255 - mean) / 0.2).pooler_output
    assert torch.allclose(network.call(pixels), expected, atol=1e-5)
    found = load_features(tmp_path / "image", video=False).call(pixels[:, :, 0])
    assert torch.allclose(found, of_image, atol=1e-5)
    with pytest.raises(DataError, match="--fvd takes video"):
        load_features(tmp_path / "image", video=True)


def test_features_are_of_no_weights_at_random(tmp_path: Path) -> None:
    """A classifier has no pooler, which transformers would draw anew for every process."""
    from safetensors.torch import load_file, save_file
    from transformers import ViTConfig, ViTForImageClassification

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = ViTForImageClassification(ViTConfig(image_size=32, patch_size=16, **small)).eval()
    model.save_pretrained(tmp_path)
    pixels = torch.randint(0, 256, (3, 3, 32, 32)).float()
    with torch.no_grad():
        expected = model.vit(pixel_values=pixels / 127.5 - 1).last_hidden_state.mean(1)
    assert torch.allclose(load_features(tmp_path, video=False).call(pixels), expected, atol=1e-5)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({name: weights[name] for name in weights if "layernorm" not in name}, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match="lack 6 weights of this ViTModel, such as"):
        load_features(tmp_path, video=False)
