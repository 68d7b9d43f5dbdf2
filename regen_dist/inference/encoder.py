"""The encoder of a trained embedder, alone: pre-encoding and caches need no decoder.

Legend: B clips, k temporal compression, H x W pixels, h = H/8, w = W/8.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regen_dist.checkpoint.export import Weights, check_shapes
from regen_dist.checkpoint.load_model import find_embedder
from regen_dist.config.exported import ExportConfig
from regen_dist.distributed.engine import precision_of
from regen_dist.errors import CheckpointError
from regen_dist.inference.codec import Codec
from regen_dist.jsontext import json_text
from regen_dist.models.diffusers_encoder import ENCODER_FACT, DiffusersEncoder
from regen_dist.models.embedder import build_encoder
from regen_dist.models.encoder import Encoder, Latents
from regen_dist.models.layers import require_cudnn
from regen_dist.observe.devices import choose_device

_PREFIX = "encoder."  # of its parameters' names in an embedder, the baseline's too


class FrozenEncoder:
    """An encoder for inference, in the precision that it was trained in.

    Args:
        encoder: with its weights.
        config: of the embedder that it is a part of.
        device: where it works.
        origin: name of the run and step of the checkpoint, where they are known.

    Attributes:
        fingerprint: SHA-256 in hex of what decides its latents: the weights in their working precision, and the parts
            of the config that the encoder is built by. A run and what was exported from it have the same.
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
        self.encoder = encoder.to(device)
        self.num_frames, self.channels = config.model.num_frames, config.model.latent.channels

    @classmethod
    def load(
        cls, path: str | Path, weights: Weights | None = None, device: torch.device | None = None
    ) -> FrozenEncoder:
        """The encoder out of a run folder or of an exported model. Nothing of the decoder is allocated.

        Args:
            path, weights, device: as for `Codec.load`.

        Raises:
            CheckpointError: there is no checkpoint, or it is damaged; an export has other weights than those asked for.
            ConfigError: the folder is neither a run of an embedder nor an export.
        """
        found = find_embedder(path, weights)
        encoder = _encoder_with(found.config, found.weights(_PREFIX), found.what)
        _expect(encoder, found.data)
        is_known = found.run is not None or found.config.origin is not None
        origin = {"run": found.name, "step": found.step} if is_known else {}
        return cls(encoder, found.config, device or choose_device(), origin)

    @torch.no_grad()
    def encode(self, clips: Tensor) -> Latents:
        """Clips [B, 3, k+1 or 1, H, W] in [-1, 1], sides multiples of 8, to latents [B, C, h, w] in the working
        precision; DataError when they do not fit."""
        latents: Latents = self.encoder(clips.to(self.device))
        return latents

    def facts(self) -> dict[str, Any]:
        """What a cache's manifest says of its encoder."""
        return {
            "fingerprint": self.fingerprint,
            "temporal_compression": self.config.model.temporal_compression,
            "precision": self.config.precision,
            "cell": self.config.model.encoder.spatial,
            "latent_frames": self.config.model.latent_frames,
            "weights": self.config.weights,
            **self._origin,
        }


def _expect(encoder: Encoder | DiffusersEncoder, facts: Mapping[str, Any] | None) -> None:
    if isinstance(encoder, DiffusersEncoder):
        encoder.expected = (facts or {}).get(ENCODER_FACT)


def check_embedder(codec: Codec, facts: Mapping[str, Any], where: str) -> None:
    """Make sure that a codec decodes what a cache's encoder made.

    Args:
        codec: the embedder that is to decode.
        facts: what the cache says of its encoder (`FrozenEncoder.facts`).
        where: how a message calls the embedder.

    Raises:
        CheckpointError: its encoder has other weights.
    """
    found = _fingerprint(codec.model.encoder, codec.config)
    if found != facts.get("fingerprint"):
        raise CheckpointError(
            f"the encoder of {where} is not the one that the latents were made with (fingerprint {found[:16]}…, theirs "
            f"is {str(facts.get('fingerprint'))[:16]}…, run {facts.get('run', 'unknown')}, step "
            f"{facts.get('step', 'unknown')}, {facts.get('weights', 'unknown')} weights); give that embedder"
        )


def _encoder_with(config: ExportConfig, weights: Mapping[str, Tensor], what: str) -> Encoder | DiffusersEncoder:
    """The encoder that a config describes, made of these weights; CheckpointError when they do not fit."""
    with torch.device("meta"):
        encoder = build_encoder(config.model)
    wanted = {_PREFIX + name: list(param.shape) for name, param in encoder.named_parameters()}
    check_shapes({name: tensor.shape for name, tensor in weights.items()}, wanted, what)
    encoder.load_state_dict({name.removeprefix(_PREFIX): tensor for name, tensor in weights.items()}, assign=True)
    return encoder


def _fingerprint(encoder: Encoder | DiffusersEncoder, config: ExportConfig) -> str:
    """In the working precision, so that neither the stored type nor the decoder changes it."""
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
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()
