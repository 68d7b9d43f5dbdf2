"""Perceptual measures by networks whose weights the user gives, and measures of the most visible video artefacts.

The package contains no weights and downloads none. LPIPS takes a TorchScript file, or the state dict of the package
`lpips` as safetensors; the Fréchet distances take a TorchScript file, or a folder of transformers with safetensors.

Legend: N frames or segments, T frames of a segment, H x W pixels, C channels, D features.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from regen_dist.errors import ConfigError, DataError
from regen_dist.inference.frames import Frame
from regen_dist.pixels import SSIM_WINDOW, ssim_terms

# Multi-scale SSIM (Wang, Simoncelli and Bovik, 2003): contrast and structure at five scales, luminance at the last.

_SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
MS_SSIM_SIDE = (SSIM_WINDOW - 1) * 2 ** (len(_SCALE_WEIGHTS) - 1) + 1  # smallest side of a frame in pixels


def ms_ssim(source: Frame, other: Frame) -> float | None:
    """MS-SSIM of two RGB frames [H, W, 3], mean over the colours; None for frames smaller than `MS_SSIM_SIDE`."""
    if min(source.shape[:2]) < MS_SSIM_SIDE:
        return None
    x, y = frame_planes(source).float(), frame_planes(other).float()
    values = []
    for scale in range(len(_SCALE_WEIGHTS)):
        if scale:
            odd = [side % 2 for side in x.shape[-2:]]
            x, y = (F.avg_pool2d(each, 2, padding=odd) for each in (x, y))
        luminance, contrast = ssim_terms(x, y)
        values.append(luminance * contrast if scale == len(_SCALE_WEIGHTS) - 1 else contrast)
    means = torch.stack([value.mean((1, 2, 3)).clamp(min=0) for value in values])  # scales, 3
    weights = torch.tensor(_SCALE_WEIGHTS)[:, None]
    return float((means**weights).prod(0).mean())


def frame_planes(frame: Frame) -> Tensor:
    """Return the colours of a frame [H, W, 3] as planes [3, 1, H, W], float64."""
    return torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[:, None].double()


# Artefacts of a patch decoder.


def flicker(source: tuple[Frame, Frame], other: tuple[Frame, Frame]) -> float:
    """Temporal flicker between two frames: the mean absolute change of the error, in 8-bit units. A static error has
    none.

    Args:
        source, other: the previous and the current frame, of the source and of the reconstruction.
    """
    before, now = (second.astype(np.int16) - first for first, second in zip(source, other, strict=True))
    return float(np.mean(np.abs(now - before), dtype=np.float64))


def grid_energy(source: Frame, other: Frame, period: int) -> float | None:
    """Share of the error's squared steps that lies on the borders of cells: A / (A + I), with A the mean squared step
    of the error between neighbouring pixels across the borders of cells of `period` pixels, and I that inside cells.

    One half without a grid, 1 where the error changes at borders alone. None where the error has no steps.
    """
    error = other.astype(np.int16) - source
    across, inside = [0.0, 0], [0.0, 0]
    for axis in (0, 1):
        steps = np.diff(error, axis=axis).astype(np.float64) ** 2
        profile = steps.mean(axis=(1 - axis, 2))  # mean squared step at each place along the axis
        border = np.arange(1, len(profile) + 1) % period == 0
        for total, chosen in ((across, profile[border]), (inside, profile[~border])):
            total[0] += float(chosen.sum())
            total[1] += len(chosen)
    if not across[1] or not inside[1]:
        return None
    a, i = across[0] / across[1], inside[0] / inside[1]
    return a / (a + i) if a + i > 0 else None


# The Fréchet distance between two sets of features, each taken as a Gaussian (Dowson and Landau, 1982).


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance |mean a - mean b|^2 + tr(A + B - 2 (A B)^(1/2)), with A and B the covariances.

    With fewer samples than features the covariances have no full rank and the distance comes out too high, the more so
    the fewer there are: compare only distances of equal sample counts. The root is never formed: with A = X'X and
    B = Y'Y its trace is the sum of the singular values of X Y'.

    Args:
        a, b: features [N, D], at least two of each.

    Raises:
        DataError: a set has fewer than two.
    """
    if min(len(a), len(b)) < 2:
        raise DataError(
            f"a Fréchet distance takes at least two features a set, found {len(a)} and {len(b)}; give more videos"
        )
    (mean_a, x), (mean_b, y) = _centred(a), _centred(b)
    root = torch.linalg.svdvals(x @ y.T).sum()
    distance = (mean_a - mean_b).square().sum() + x.square().sum() + y.square().sum() - 2 * root
    return max(0.0, float(distance))


def _centred(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [D], and X [N, D] with X'X the covariance, in float64."""
    features = features.double()
    mean = features.mean(0)
    return mean, (features - mean) / (len(features) - 1) ** 0.5


# Networks from files that the user gives.


@dataclass(frozen=True)
class GivenNetwork:
    """A network that the user gave.

    Attributes:
        call: LPIPS: (a, b) [N, 3, H, W] in [-1, 1] to [N]; features: pixels in [0, 255], [N, 3, H, W] or
            [N, 3, T, H, W], to [N, D].
        name: file or folder name, and the first digits of the SHA-256 of its weights.
        segment_frames: T that a video network takes; None for any.
    """

    call: Callable[..., Tensor]
    name: str
    segment_frames: int | None = None


def load_lpips(path: Path) -> GivenNetwork:
    """Load LPIPS (Zhang et al., 2018) with the user's weights.

    Args:
        path: TorchScript that takes two batches [N, 3, H, W] in [-1, 1]; or `.safetensors`, the state dict of
            `lpips.LPIPS(net="alex")` or `net="vgg"`.

    Raises:
        ConfigError: there is no such file.
        DataError: the file or folder holds something else.
    """
    _check_file(path)
    if path.suffix != ".safetensors":
        module = _torchscript(path)
        return GivenNetwork(torch.no_grad()(lambda a, b: module(a, b).float().flatten()), _named(path, [path]))
    with safe_open(path, "pt") as file:
        weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 - not a mapping
    return GivenNetwork(_lpips_of(weights, path), _named(path, [path]))


_LPIPS_SHIFT, _LPIPS_SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_ALEX_STRIDES, _ALEX_PADDING, _ALEX_POOLED = (4, 1, 1, 1, 1), (2, 2, 1, 1, 1), (1, 2)


def _lpips_of(weights: Mapping[str, Tensor], path: Path) -> Callable[[Tensor, Tensor], Tensor]:
    """Build LPIPS from the package's state dict, with names like `net.slice1.0.weight` and `lin0.model.1.weight`."""
    found_convs = [(match, name) for name in weights if (match := re.fullmatch(r"net\.slice(\d)\.(\d+)\.weight", name))]
    convs = [(int(m[1]), name.removesuffix(".weight")) for m, name in sorted(found_convs, key=lambda e: int(e[0][2]))]
    # The package registers each linear layer twice; which of the names is in the file depends on how it was saved.
    names = [(f"lin{i}.model.1.weight", f"lins.{i}.model.1.weight") for i in range(5)]
    lins = [weights[found] for pair in names if (found := next((name for name in pair if name in weights), None))]
    layouts = {5: "alex", 13: "vgg"}
    if len(lins) != 5 or len(convs) not in layouts or any(f"{name}.bias" not in weights for _, name in convs):
        raise DataError(
            f"{path} is not the state dict of lpips.LPIPS: found {len(convs)} convolutions (alex has 5, vgg 13) and "
            f"{len(lins)} linear layers of 5. Write it by safetensors.torch.save_model(lpips.LPIPS(net='alex'), FILE)"
        )
    alex = layouts[len(convs)] == "alex"

    def features(x: Tensor) -> list[Tensor]:
        shift, scale = (torch.tensor(each)[:, None, None] for each in (_LPIPS_SHIFT, _LPIPS_SCALE))
        x, made, last = (x - shift) / scale, [], 1
        for number, (part, name) in enumerate(convs):
            if part != last:
                made.append(x)
                pooled = not alex or number in _ALEX_POOLED
                x, last = F.max_pool2d(x, 3 if alex else 2, 2) if pooled else x, part
            stride, padding = (_ALEX_STRIDES[number], _ALEX_PADDING[number]) if alex else (1, 1)
            x = F.relu(F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride, padding))
        return [*made, x]

    @torch.no_grad()
    def distance(a: Tensor, b: Tensor) -> Tensor:
        total = torch.zeros(len(a))
        for of_a, of_b, lin in zip(features(a), features(b), lins, strict=True):
            unit_a, unit_b = (each / (each.square().sum(1, keepdim=True).sqrt() + 1e-10) for each in (of_a, of_b))
            total += F.conv2d((unit_a - unit_b).square(), lin).mean((1, 2, 3))
        return total

    return distance


def load_features(path: Path, *, video: bool) -> GivenNetwork:
    """Load a network whose features a Fréchet distance compares.

    Args:
        path: TorchScript, as `i3d_torchscript.pt` of StyleGAN-V (video) or `inception-2015-12-05.pt` of StyleGAN3
            (frames): it is called with float pixels in [0, 255] and those of `rescale`, `resize`, `return_features`
            that it has; or a folder with `config.json` and safetensors that `transformers.AutoModel` opens (VideoMAE;
            DINOv2, ViT).
        video: true for a network of segments of video, [N, 3, T, H, W]; false for one of frames, [N, 3, H, W].

    Raises:
        ConfigError: there is no such file or folder.
        DataError: the file or folder holds something else.
    """
    if path.is_dir():
        return _transformers_features(path, video)
    _check_file(path)
    module = _torchscript(path)
    names = {argument.name for argument in module.forward.schema.arguments}
    options = {name: True for name in ("rescale", "resize", "return_features") if name in names}

    @torch.no_grad()
    def features(pixels: Tensor) -> Tensor:
        return module(pixels, **options).float().flatten(1)  # type: ignore[no-any-return]

    return GivenNetwork(features, _named(path, [path]))


def _transformers_features(folder: Path, video: bool) -> GivenNetwork:
    from transformers import AutoModel

    files = sorted(folder.glob("*.safetensors"))
    if not files or not (folder / "config.json").is_file():
        raise DataError(
            f"{folder} holds no config.json with safetensors, as `save_pretrained` of transformers writes"
            "; save the network so"
        )
    options = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    model, found = AutoModel.from_pretrained(folder, **options)  # type: Any, Any
    drawn = sorted(found["missing_keys"])  # weights that are not in the files: at random
    if missing := [name for name in drawn if "pooler" not in name]:
        raise DataError(
            f"{folder}: its safetensors lack {len(missing)} weights of this {type(model).__name__}, such as "
            f"{missing[0]}; give the folder of the whole network"
        )
    model.eval()
    given = getattr(model.config, "image_size", None)
    side = given if isinstance(given, int) else int(given[0]) if given else 224
    frames = getattr(model.config, "num_frames", None)
    if (frames is not None) != video:
        raise DataError(f"{folder} is a network of {'frames' if video else 'video'}; --fvd takes video, --fid frames")
    preprocessing = folder / "preprocessor_config.json"
    values = json.loads(preprocessing.read_text(encoding="utf-8")) if preprocessing.is_file() else {}
    mean, std = (torch.tensor(values.get(name) or [0.5] * 3)[:, None, None] for name in ("image_mean", "image_std"))

    @torch.no_grad()
    def features(pixels: Tensor) -> Tensor:
        flat = pixels.transpose(1, 2).flatten(0, 1) if video else pixels  # one frame a row
        flat = F.interpolate(flat, size=(side, side), mode="bicubic", antialias=True).clamp(0, 255)
        flat = (flat / 255 - mean) / std
        made = model(pixel_values=flat.unflatten(0, (len(pixels), -1)) if video else flat)
        pooled = None if drawn else getattr(made, "pooler_output", None)
        features: Tensor = made.last_hidden_state.mean(1) if pooled is None else pooled
        return features.float()

    return GivenNetwork(features, _named(folder, files), frames)


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise ConfigError(f"there are no weights at {path}; docs/evaluate.md names files that serve")


def _torchscript(path: Path) -> Any:
    try:
        return torch.jit.load(str(path), map_location="cpu").eval()
    except (RuntimeError, ValueError) as error:
        raise DataError(
            f"{path} is no TorchScript file ({str(error).splitlines()[0]}); pickled weights are not opened"
        ) from error


def _named(path: Path, files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return f"{path.name}, SHA-256 {digest.hexdigest()[:12]}"


def segments(frames: list[Frame], length: int) -> Tensor:
    """Yield consecutive whole segments of `length` frames: float [N, 3, T, H, W] in [0, 255]."""
    whole = len(frames) // length
    pixels: Tensor = torch.from_numpy(np.stack(frames[: whole * length])).unflatten(0, (whole, length))
    return pixels.permute(0, 4, 1, 2, 3).float()
