"""Frozen third-party encoder: that of any video autoencoder of diffusers, for which our decoder is trained.

It is no part of the model: it has no parameters here, is never trained and never saved. A checkpoint names it by
fingerprint. The package is imported, and the weights are read, when the first video is encoded.

Legend: B batch, T = k+1 frames of a clip, r frames for each latent frame after the first, n = 1 + k/r latent frames, Z
    latent channels, h x w latent cells.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from regen_dist.config.embedder import ModelConfig
from regen_dist.errors import CheckpointError, ConfigError, DataError, needing_extra
from regen_dist.jsontext import json_text
from regen_dist.models.encoder import Latents

ENCODER_FACT = "encoder"  # under which a checkpoint's facts on its data name the frozen encoder's fingerprint
_CONFIG = "config.json"


def latent_frames(latents: Latents, channels: int) -> Tensor:
    """Return the latents of a frozen encoder as [B, n, Z, h, w]: `content` is the first frame, `motion` all others as
    channels. Those of an image are followed by zeros."""
    frames: Tensor = torch.cat([latents.content, latents.motion], 1).unflatten(1, (-1, channels))
    return frames


def load_autoencoder(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Load a diffusers autoencoder from the `config.json` and safetensors of a folder; no code in it is run.

    Raises:
        ConfigError: the folder holds no such autoencoder, or not all of its weights.
        BackendError: diffusers is not installed.
    """
    with needing_extra(f"{folder}, an autoencoder of diffusers,"):
        import diffusers
    config = folder / _CONFIG
    try:
        name = str(json.loads(config.read_text(encoding="utf-8"))["_class_name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{config} is no config that diffusers has saved ({type(error).__name__}: {error}); give the "
            "autoencoder's folder"
        ) from error
    kind = getattr(diffusers, name, None) if name.startswith("Autoencoder") else None
    if kind is None:
        raise ConfigError(f"{config}: {name!r} is no autoencoder of diffusers {diffusers.__version__}")
    options = {"torch_dtype": dtype, "use_safetensors": True, "local_files_only": True, "low_cpu_mem_usage": False}
    try:
        with torch.device("cpu"):
            model, found = kind.from_pretrained(folder, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise ConfigError(
            f"{folder}: the weights of this {name} cannot be read; it needs whole safetensors that belong to its "
            f"{_CONFIG} (pickled weights are not read): {error}"
        ) from error
    if found["missing_keys"]:
        raise ConfigError(
            f"{folder}: its safetensors lack {len(found['missing_keys'])} weights of this {name}, such as "
            f"{min(found['missing_keys'])}; give the folder of the whole autoencoder"
        )
    return model.eval()


class DiffusersEncoder(nn.Module):
    """Video [B, 3, T, H, W] in [-1, 1] to `Latents`: `content` [B, Z, h, w] the first latent frame, `motion`
    [B, (n-1)*Z, h, w] the others (zeros for an image).

    They are the means of the posterior, normalised by what the autoencoder's config says, as the diffusion models of
    its family take them: (z - latents_mean) / latents_std * scaling_factor.

    Attributes:
        expected: fingerprint that the weights must have; None takes any.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.settings, self.channels, self.num_frames = config.encoder, config.latent.channels, config.num_frames
        self.rest = config.temporal_compression // config.encoder.temporal
        self.expected: str | None = None

    @torch.no_grad()
    def forward(self, video: Tensor) -> Latents:
        self._check(video)
        if video.is_meta:
            shape = (len(video), self.channels, *(side // self.settings.spatial for side in video.shape[-2:]))
            return Latents(video.new_empty(shape), video.new_empty(shape).repeat(1, self.rest, 1, 1))
        model = self._model.to(video.device)
        z = model.encode(video.to(model.dtype)).latent_dist.mode()  # [B, Z, n, h, w]
        self._check_latent(z, video)
        mean, std, scale = (part.to(z) for part in self._scale)
        z = ((z.movedim(1, -1) - mean) / std * scale).permute(0, 1, 4, 2, 3)  # [B, n, Z, h, w]
        content = z[:, 0]
        rest = z[:, 1:].flatten(1, 2) if z.shape[1] > 1 else content.new_zeros(content.shape).repeat(1, self.rest, 1, 1)
        dtype = video.dtype if video.dtype.is_floating_point else torch.float32
        return Latents(content.to(dtype), rest.to(dtype))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 in hex of the autoencoder's config and weights, and of the conversion to latents here."""
        weights = sorted(self._read[0].state_dict().items())
        written = json.loads(self.settings.autoencoder_config().read_text(encoding="utf-8"))
        config = {name: value for name, value in written.items() if name[:1] != "_"}
        facts = [config, self.settings.precision, self.num_frames]
        digest = hashlib.sha256(json_text(facts, sort_keys=True).encode())
        for name, tensor in weights:
            if name.startswith(("encoder.", "quant_conv.", "latents_")):
                digest.update(f"{name} {list(tensor.shape)}".encode())
                digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
        return digest.hexdigest()

    @property
    def _model(self) -> Any:
        """Return the autoencoder, after checking that it is the expected one."""
        if self.expected not in (None, self.fingerprint):
            raise CheckpointError(
                f"{self.settings.path}: not the autoencoder that this model was trained with (fingerprint "
                f"{self.fingerprint[:16]}…, its own is {str(self.expected)[:16]}…); set model.encoder.path to that"
            )
        return self._read[0]

    @cached_property
    def _read(self) -> tuple[Any]:
        """Read the autoencoder, in a tuple: as an attribute it would become a child of this module."""
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[self.settings.precision]
        return (load_autoencoder(self.settings.autoencoder_config().parent, dtype).requires_grad_(False),)

    @cached_property
    def _scale(self) -> tuple[Tensor, Tensor, Tensor]:
        model = self._model

        def channel_values(name: str, default: float) -> Tensor:
            value = dict(model.named_buffers()).get(name)
            value = model.config.get(name) if value is None else value
            return torch.as_tensor(default if value is None else value, dtype=torch.float32)

        return (
            channel_values("latents_mean", 0.0),
            channel_values("latents_std", 1.0),
            channel_values("scaling_factor", 1.0),
        )

    def _check(self, video: Tensor) -> None:
        cell = self.settings.spatial
        frames, height, width = video.shape[2:]
        if video.ndim != 5 or video.shape[1] != 3 or frames not in (1, self.num_frames):
            raise DataError(f"a clip is [batch, 3, {self.num_frames} or 1, height, width], found {list(video.shape)}")
        if not height or not width or height % cell or width % cell:
            raise DataError(f"sides must be multiples of {cell}, found {height}x{width}; pad or crop the video first")

    def _check_latent(self, z: Tensor, video: Tensor) -> None:
        frames, height, width = video.shape[2:]
        cell = self.settings.spatial
        wanted = [self.channels, 1 if frames == 1 else 1 + self.rest, height // cell, width // cell]
        if list(z.shape[1:]) != wanted:
            raise ConfigError(
                f"{self.settings.path}: {frames} frames of {height}x{width} become latents {list(z.shape[1:])} "
                f"[channels, frames, rows, columns], the config says {wanted}; set model.latent.channels={z.shape[1]}, "
                f"model.encoder.cell={height // z.shape[3]} and model.encoder.stride="
                f"{(frames - 1) // max(1, z.shape[2] - 1) if frames > 1 else self.settings.stride}"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the autoencoder, which is read again where it is needed."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_read", "_scale")}
