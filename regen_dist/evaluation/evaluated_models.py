"""Models that `regen evaluate` compares: runs, exports, diffusers autoencoders, trivial decoders.

Legend: B clips, T frames, H x W pixels, C latent channels, t latent frames.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from regen_dist.errors import ConfigError, DataError
from regen_dist.evaluation.metrics import LATENT_BITS
from regen_dist.evaluation.reconstruct import LABELS, TRIVIAL_KINDS, TrivialCodec
from regen_dist.inference.codec import PACKAGED_EMBEDDER, Codec, Window, blended, window_weights
from regen_dist.inference.long_video import VideoCodec
from regen_dist.models.diffusers_encoder import load_autoencoder
from regen_dist.models.encoder import Latents
from regen_dist.models.flops import count_flops
from regen_dist.observe.hardware import choose_device

PACKAGED = "packaged"
_PIXEL_BITS = 8  # bits of a value in the whole frames that the trivial decoders take


@dataclass(frozen=True)
class EvaluatedModel:
    """One column of the evaluation.

    Attributes:
        name: name in the columns and in file names.
        label: name of the model in the table.
        codec: the codec that encodes and decodes.
        steps: sampling steps of decoding.
        bits: map from (latent values, frames of a clip) to the number of stored bits.
        parameters: number of parameters, encoder and decoder together.
        fingerprint: SHA-256 in hex of everything that decides the output.
        flops: map from (height, width) of frames to the operations of (encoding, decoding) one clip; None where they
            cannot be counted.
    """

    name: str
    label: str
    codec: VideoCodec
    steps: int
    bits: Callable[[int, int], int]
    parameters: int
    fingerprint: str
    flops: Callable[[int, int], tuple[int | None, int] | None]


class DiffusersCodec:
    """Adapter of a diffusers autoencoder to a codec of clips; uses the mode of the latent distribution.

    Args:
        folder: folder with `config.json` and safetensors, as `save_pretrained` writes it; no code in it is run.
        num_frames: frames of a clip. Causal video autoencoders of temporal compression r take n r + 1.

    Raises:
        ConfigError: the folder is not one of diffusers' autoencoders, or lacks weights.
        BackendError: diffusers is not installed.
    """

    kind = "diffusers"

    def __init__(self, folder: Path, num_frames: int) -> None:
        self.model, self.num_frames = load_autoencoder(folder), num_frames
        self.model = self.model.to(choose_device())
        self.is_video = any(isinstance(part, nn.Conv3d) for part in self.model.modules())
        self.multiple = _spatial_compression(self.model)
        self._channels = 0

    @torch.no_grad()
    def encode(self, clips: Tensor) -> Latents:
        """Encode clips [B, 3, T, H, W] to [B, C t, h, w] and an empty motion latent; sides are padded with the edge to
        a size that the model takes."""
        z = encode_with(self.model, self._filled(clips).to(self.model.device, self.model.dtype), self.is_video)
        self._channels = z.shape[1]
        content = z.flatten(1, 2)
        return Latents(content, content.new_zeros(len(content), 0, *content.shape[-2:]))

    @torch.no_grad()
    def decode_windows(
        self, windows: list[Window], times: Tensor, *, steps: int = 1, seed: int = 0, sample_id: int = 0
    ) -> Tensor:
        """Decode frames [1, 3, F, H, W] at `times` [F], whole numbers; overlapping windows are blended."""

        def decode(window: Window, seen: Tensor) -> Tensor:
            z = window.latents.content.unflatten(1, (self._channels, -1))
            frames = decode_with(self.model, z, self.is_video).float().cpu().clamp(-1, 1)
            at = (times[seen] - window.start).round().long()
            if frames.shape[2] <= int(at.max()):
                raise DataError(
                    f"the autoencoder gives {frames.shape[2]} frames of a clip of {window.length}: its clips must have "
                    "n r + 1 frames, with r its temporal compression; choose --clip-frames so"
                )
            return frames[:, :, at]

        return blended(windows, window_weights(windows, times).float(), decode)

    def _filled(self, clips: Tensor) -> Tensor:
        rows, columns = (-side % self.multiple for side in clips.shape[-2:])
        return F.pad(clips, (0, columns, 0, rows, 0, 0), mode="replicate") if rows or columns else clips


def encode_with(model: Any, clips: Tensor, is_video: bool) -> Tensor:
    """Encode clips [B, 3, T, H, W] to latents [B, C, t, h, w]; an image autoencoder encodes every frame by itself."""
    made = model.encode(clips if is_video else clips.transpose(1, 2).flatten(0, 1))
    z: Tensor = made.latent if hasattr(made, "latent") else made.latent_dist.mode()
    if is_video:
        return z
    parted: Tensor = z.unflatten(0, (len(clips), -1))
    return parted.transpose(1, 2)


def decode_with(model: Any, z: Tensor, is_video: bool) -> Tensor:
    """Decode latents to frames [B, 3, T, H, W]."""
    if not is_video:
        frames: Tensor = model.decode(z.transpose(1, 2).flatten(0, 1)).sample
        video: Tensor = frames.unflatten(0, (len(z), -1))
        return video.transpose(1, 2)
    timed = getattr(model.config, "timestep_conditioning", False)
    given = {"temb": torch.zeros(len(z), device=z.device, dtype=z.dtype)} if timed else {}
    return model.decode(z, **given).sample  # type: ignore[no-any-return]


def _spatial_compression(model: Any) -> int:
    """Width of a latent cell in pixels, or a multiple of it: 32 where the model does not record it."""
    config = model.config
    for owner, name in ((model, "spatial_compression_ratio"), (config, "spatial_compression_ratio"),
                        (config, "scale_factor_spatial")):  # fmt: skip
        value = getattr(owner, name, None)
        if isinstance(value, int):
            return value
    return 32


def load_models(
    given: list[str], *, steps: int, clip_frames: int, baselines: bool
) -> list[Callable[[], EvaluatedModel]]:
    """Loaders of the models that the command compares; each loads its model when called, so one is held at a time.

    Args:
        given: `PATH`, `NAME=PATH`, `packaged`, or a trivial decoder's name.
        steps: sampling steps of REGEN models.
        clip_frames: frames of a clip, for trivial decoders and diffusers autoencoders.
        baselines: add all trivial decoders.

    Raises:
        ConfigError: a path does not exist, or two models have the same name.
    """
    named = [_split(each) for each in given] + [
        (kind, kind) for kind in TRIVIAL_KINDS if baselines and kind not in given
    ]
    names = [name for name, _ in named]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"several models are called {', '.join(twice)}; give --model NAME=PATH")
    missing = [path for _, path in named if path not in (*TRIVIAL_KINDS, PACKAGED) and not Path(path).is_dir()]
    if missing:
        raise ConfigError(
            f"there is no model at {', '.join(missing)}: expected the folder of a run, an export or a diffusers "
            f"autoencoder, `{PACKAGED}`, or one of {', '.join(TRIVIAL_KINDS)}"
        )
    return [_loader(name, path, steps, clip_frames) for name, path in named]


def _split(given: str) -> tuple[str, str]:
    name, equals, path = given.partition("=")
    if not equals:
        name, path = Path(given).resolve().name if Path(given).is_dir() else given, given
    if not re.fullmatch(r"[\w.+-]+", name):
        raise ConfigError(
            f"a model cannot be called {name!r}: letters, digits, '.', '_', '+' and '-'; NAME=PATH sets it"
        )
    return name, path


def _loader(name: str, path: str, steps: int, clip_frames: int) -> Callable[[], EvaluatedModel]:
    def load() -> EvaluatedModel:
        if path in TRIVIAL_KINDS:
            return _trivial(name, path, clip_frames)
        if path != PACKAGED and _is_diffusers(Path(path)):
            return _diffusers(name, Path(path), clip_frames)
        return _own(name, PACKAGED_EMBEDDER if path == PACKAGED else Path(path), steps)

    return load


def _is_diffusers(folder: Path) -> bool:
    """Return whether a folder is a diffusers model, but not an export of this project, which has a `config.yaml`."""
    return (folder / "config.json").is_file() and not (folder / "config.yaml").is_file()


def _own(name: str, folder: Path, steps: int) -> EvaluatedModel:
    codec = Codec.load(folder)
    model, baseline = codec.config.model, codec.kind == "magvit2"
    steps = 1 if baseline else steps

    def flops(height: int, width: int) -> tuple[int | None, int]:
        up = model.encoder.spatial
        counted = count_flops(model, (-(-height // up) * up, -(-width // up) * up)).forward_flops
        rest = sum(counted.values()) - counted["encoder"]
        return None if model.encoder.frozen else counted["encoder"], rest * steps  # a frozen one is not counted

    settings = codec.config.model_dump_json(include={"model", "diffusion"})
    kind = "MAGVIT-v2 baseline" if baseline else f"REGEN, {steps} step{'s' if steps > 1 else ''}"
    label = f"{name} ({kind}, k = {codec.temporal_compression})"
    return EvaluatedModel(
        name, label, codec, steps, _latent_bits, _parameters(codec.model), _digest(codec.model, settings), flops
    )


def _diffusers(name: str, folder: Path, clip_frames: int) -> EvaluatedModel:
    codec = DiffusersCodec(folder, clip_frames)

    def flops(height: int, width: int) -> tuple[int, int] | None:
        sides = (-(-side // codec.multiple) * codec.multiple for side in (height, width))
        try:
            with torch.device("meta"), torch.no_grad():
                model = type(codec.model).from_config(codec.model.config).eval()
                clip = torch.empty(1, 3, clip_frames, *sides)
                with FlopCounterMode(display=False) as encoding:
                    z = encode_with(model, clip, codec.is_video)
                with FlopCounterMode(display=False) as decoding:
                    decode_with(model, z, codec.is_video)
        except (RuntimeError, NotImplementedError, ValueError, TypeError):
            return None  # some of these models read values, which the meta device does not have
        return int(encoding.get_total_flops()), int(decoding.get_total_flops())

    label = f"{name} ({type(codec.model).__name__})"
    settings = repr(sorted((name, value) for name, value in codec.model.config.items() if not name.startswith("_")))
    size, digest = _parameters(codec.model), _digest(codec.model, settings)
    return EvaluatedModel(name, label, codec, 1, _latent_bits, size, digest, flops)


def _trivial(name: str, kind: Any, clip_frames: int) -> EvaluatedModel:
    def bits(values: int, clip: int) -> int:
        """Bits of the whole frames that are used; the codec returns two frames a clip, even where it uses one."""
        return values * _PIXEL_BITS // (1 if clip == 1 or kind == "blend" else 2)

    fingerprint = hashlib.sha256(f"{kind} {clip_frames}".encode()).hexdigest()
    label = f"{LABELS[kind]}, clips of {clip_frames}"
    codec = TrivialCodec(kind, clip_frames)
    return EvaluatedModel(name, label, codec, 1, bits, 0, fingerprint, lambda height, width: (0, 0))


def _latent_bits(values: int, clip: int) -> int:
    return values * LATENT_BITS


def _parameters(model: nn.Module) -> int:
    return sum(each.numel() for each in model.parameters())


def _digest(model: nn.Module, settings: str) -> str:
    """Digest of weights and settings: some of these, such as the number of heads, leave the weights' shapes alone."""
    digest = hashlib.sha256(f"{type(model).__name__} {settings}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
