"""What a cache is made of: everything that decides its latents and text embeddings, and one fingerprint over it."""

from __future__ import annotations

import hashlib
from typing import Any

from regen_dist import __version__
from regen_dist.config.preencode import PreencodeConfig
from regen_dist.data.dataset.catalogue import Dataset
from regen_dist.data.dataset.index import SCHEMA_VERSION
from regen_dist.data.dataset.manifest import Kind, described
from regen_dist.inference.encoder import FrozenEncoder
from regen_dist.jsontext import json_text
from regen_dist.models.text import TextEncoder

KIND: Kind = "latents"
ENCODING_VERSION = 1  # raise it when the same config, weights and videos would give other bytes
SIDE_MULTIPLE = 16  # pixels: a latent cell of 8, and 2 x 2 cells for a token of a text-to-video model
_SPACE = ("encoder", "preprocessing", "text", "code")  # what the fingerprint is over


def cache_identity(
    config: PreencodeConfig, dataset: Dataset, encoder: FrozenEncoder, text: TextEncoder | None
) -> dict[str, Any]:
    """What a cache's folder is claimed with: the parts of the fingerprint, and which videos are encoded."""
    return {
        "kind": KIND,
        "schema_version": SCHEMA_VERSION,
        "source": source_identity(dataset),
        "encoder": {"fingerprint": encoder.fingerprint},
        "preprocessing": _preprocessing(config, encoder),
        "text": None if text is None else _text(text),
        "code": {"version": __version__, "encoding_version": ENCODING_VERSION},
    }


def source_identity(dataset: Dataset) -> dict[str, Any]:
    """Everything of a dataset of videos that a cache depends on: bytes and order of the samples, their captions, what
    else the indices say, and which shard each is in, for entries are made and numbered shard by shard."""
    manifest = dataset.manifest
    return {
        "fingerprint": manifest.fingerprint,
        **described(dataset.store, manifest).model_dump(),
        "shards": manifest.boundaries(),
        "samples": manifest.totals.samples,
    }


def fingerprint_of(identity: dict[str, Any]) -> str:
    """32 hex digits of SHA-256 over what decides the latents. The videos are no part of it: caches of several datasets
    that were made alike can be mixed."""
    parts = json_text({name: identity[name] for name in _SPACE}, sort_keys=True)
    return hashlib.sha256(parts.encode()).hexdigest()[:32]


def _preprocessing(config: PreencodeConfig, encoder: FrozenEncoder) -> dict[str, Any]:
    return {
        "buckets": [list(size) for size in config.buckets],
        "stride": config.stride,
        "max_clips": config.max_clips,
        "num_frames": encoder.num_frames,
        "batch_clips": config.batch_clips,
    }


def _text(text: TextEncoder) -> dict[str, Any]:
    """Without the encoder's name: it may be a path."""
    facts = text.facts()
    return {name: facts[name] for name in ("fingerprint", "width", "max_tokens")}
