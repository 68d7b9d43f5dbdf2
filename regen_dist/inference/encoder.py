"""The encoder of a trained embedder without its decoder, which pre-encoding and caches do not need.

Legend: B clips, k temporal compression, H x W pixels, h = H/8, w = W/8.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regen_dist.checkpoint.export import Weights, check_shapes, find_embedder
from regen_dist.config.exported import ExportConfig
from regen_dist.distributed.engine import precision_of
from regen_dist.errors import CheckpointError
from regen_dist.inference.codec import Codec, set_expected_encoder
from regen_dist.jsontext import json_text
from regen_dist.models.diffusers_encoder import DiffusersEncoder
from regen_dist.models.embedder import build_encoder
from regen_dist.models.encoder import Encoder, Latents
from regen_dist.models.layers import require_cudnn
from regen_dist.observe.hardware import choose_device, inference_dtype

_PREFIX = "encoder."  # prefix of its parameter names in an embedder, the baseline's too


class FrozenEncoder:
    """Encoder for inference, with the weights in the precision of its training (`inference_dtype` of the computation).

    Args:
        encoder: the module with its weights loaded.
        config: config of the embedder that the encoder is a part of.
        device: device to compute on.
        origin: name of the run and step of the checkpoint, where they are known.

    Attributes:
        fingerprint: SHA-256 in hex of everything that decides the latents: the weights in their working precision, and
            the parts of the config that the encoder is built from. A run and its export have the same fingerprint.
    """

    def __init__(
        self,
        encoder: Encoder | DiffusersEncoder,
        config: ExportConfig,
        device: torch.device,
        origin: Mapping[str, Any] | None = None,
    ) -> None:
        self.config, self.device, self._origin = config, device, dict(origin or {})
        require_cudnn(device.type, precision_of(config.precision))
        encoder = encoder.to(precision_of(config.precision)).eval()
        self.fingerprint = _fingerprint(encoder, config)
        self.encoder = encoder.to(device, inference_dtype(config.precision, device))
        self.num_frames, self.channels = config.model.num_frames, config.model.latent.channels

    @classmethod
    def load(
        cls, path: str | Path, weights: Weights | None = None, device: torch.device | None = None
    ) -> FrozenEncoder:
        """Load the encoder from a run folder or an export. Nothing of the decoder is allocated.

        Args:
            path, weights, device: see `Codec.load`.

        Raises:
            CheckpointError: there is no checkpoint, or it is damaged; an export holds other weights than requested.
            ConfigError: the folder is neither a run of an embedder nor an export.
        """
        found = find_embedder(path, weights)
        encoder = _encoder_with(found.config, found.weights(_PREFIX), found.what)
        set_expected_encoder(encoder, found.data)
        is_known = found.run is not None or found.config.origin is not None
        origin = {"run": found.name, "step": found.step} if is_known else {}
        return cls(encoder, found.config, device or choose_device(), origin)

    @torch.no_grad()
    def encode(self, clips: Tensor) -> Latents:
        """Encode clips [B, 3, k+1 or 1, H, W] in [-1, 1], sides multiples of 8, to latents [B, C, h, w] in the working
        precision; raises DataError when the shape does not fit."""
        latents: Latents = self.encoder(clips.to(self.device))
        return latents

    def facts(self) -> dict[str, Any]:
        """Facts about the encoder that a cache's manifest records."""
        return {
            "fingerprint": self.fingerprint,
            "temporal_compression": self.config.model.temporal_compression,
            "precision": self.config.precision,
            "cell": self.config.model.encoder.spatial,
            "latent_frames": self.config.model.latent_frames,
            "weights": self.config.weights,
            **self._origin,
        }


def check_embedder(codec: Codec, facts: Mapping[str, Any], where: str) -> None:
    """Check that a codec decodes the latents of a cache's encoder.

    Args:
        codec: the embedder that decodes.
        facts: the cache's record of its encoder (`FrozenEncoder.facts`).
        where: name of the embedder in error messages.

    Raises:
        CheckpointError: the codec's encoder has other weights.
    """
    found = _fingerprint(codec.model.encoder, codec.config)
    if found != facts.get("fingerprint"):
        raise CheckpointError(
            f"the encoder of {where} is not the one that the latents were made with (fingerprint {found[:16]}…, theirs "
            f"is {str(facts.get('fingerprint'))[:16]}…, run {facts.get('run', 'unknown')}, step "
            f"{facts.get('step', 'unknown')}, {facts.get('weights', 'unknown')} weights); give that embedder"
        )


def _encoder_with(config: ExportConfig, weights: Mapping[str, Tensor], what: str) -> Encoder | DiffusersEncoder:
    """Build the encoder that a config describes from these weights; CheckpointError when they do not fit."""
    with torch.device("meta"):
        encoder = build_encoder(config.model)
    wanted = {_PREFIX + name: list(param.shape) for name, param in encoder.named_parameters()}
    check_shapes({name: tensor.shape for name, tensor in weights.items()}, wanted, what)
    encoder.load_state_dict({name.removeprefix(_PREFIX): tensor for name, tensor in weights.items()}, assign=True)
    return encoder


def _fingerprint(encoder: Encoder | DiffusersEncoder, config: ExportConfig) -> str:
    """Fingerprint in the precision of training, so that neither the stored type, nor that of the computation, nor the
    decoder changes it."""
    if isinstance(encoder, DiffusersEncoder):
        return encoder.fingerprint
    model = config.model
    built_by = {
        "encoder": model.encoder.model_dump(mode="json"),
        "channels": model.latent.channels,
        "temporal_compression": model.temporal_compression,
        "precision": config.precision,
    }
    digest = hashlib.sha256(json_text(built_by, sort_keys=True).encode())
    for name, tensor in sorted(encoder.named_parameters()):
        digest.update(f"{name} {list(tensor.shape)}".encode())
        working = tensor.detach().to("cpu", precision_of(config.precision))
        digest.update(working.float().contiguous().numpy().tobytes())
    return digest.hexdigest()
