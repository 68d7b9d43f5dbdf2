"""Latent cache entries: latents of a video's clips and embeddings of its caption in one safetensors file; and their
description in the manifest.

Legend: n clips, C channels, h x w latent cells, L tokens of the caption, D their width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from regen_dist.config.run import SPATIAL_COMPRESSION
from regen_dist.data.format.manifest import DatasetManifest, only_latents
from regen_dist.data.storage.store import Store
from regen_dist.errors import DataError
from regen_dist.jsontext import json_text

LATENT_EXTENSION = "safetensors"
NULL_TEXT = "null.safetensors"
_METADATA = "regen"  # one JSON entry: safetensors writes several in an order that varies between processes
_DTYPES = {"content": torch.bfloat16, "motion": torch.bfloat16, "text": torch.bfloat16, "mask": torch.uint8}
_NDIM = {"content": 4, "motion": 4, "text": 2, "mask": 1}
_ALL_SUCH = "; `regen shards verify --deep` lists all such entries"


class TextEmbedding(NamedTuple):
    """Caption embedding: `text` float32 [L, D], `mask` bool [L], True for valid tokens."""

    text: Tensor
    mask: Tensor


class LatentEntry(NamedTuple):
    """Stored entry of one video of a cache.

    `content` bf16 [n, C, h, w], raw latents; `motion` alike, [0, C, h, w] for an image, whose n is 1; `text` bf16
    [L, D] and `mask` uint8 [L] where the cache has text; `metadata`, strings about the entry.
    """

    content: Tensor
    motion: Tensor
    text: Tensor | None = None
    mask: Tensor | None = None
    metadata: Mapping[str, str] = {}

    @property
    def clips(self) -> int:
        """Return the number of complete clips: 0 for an image."""
        return len(self.motion)


def pack_latents(
    content: Tensor, motion: Tensor, text: Tensor | None = None, metadata: Mapping[str, str] | None = None
) -> bytes:
    """Serialise an entry; equal tensors and metadata give equal bytes.

    Args:
        content: [n, C, h, w] of any floating type.
        motion: [n, C, h, w]; [0, C, h, w] for an image.
        text: [L, D], embeddings of the valid tokens.
        metadata: strings about the entry.

    Raises:
        DataError: the shapes are inconsistent.
    """
    tensors = {"content": content, "motion": motion} | _text_tensors(text)
    _check_shapes(tensors)
    words = json_text(dict(metadata or {}), sort_keys=True, ensure_ascii=False)
    return save({name: _stored(name, tensor) for name, tensor in tensors.items()}, {_METADATA: words})


def unpack_latents(data: bytes) -> LatentEntry:
    """Parse an entry of `pack_latents`; raise DataError if it is damaged or something else."""
    tensors = _load(data)
    missing = [name for name in ("content", "motion") if name not in tensors]
    if missing:
        raise DataError(f"not an entry of a latent cache: there is no tensor '{missing[0]}' in it{_ALL_SUCH}")
    _check_types(tensors)
    _check_shapes(tensors)
    return LatentEntry(
        tensors["content"], tensors["motion"], tensors.get("text"), tensors.get("mask"), _metadata_of(data)
    )


def pack_null_text(text: Tensor) -> bytes:
    """Serialise the embedding [L, D] of the empty caption."""
    tensors = _text_tensors(text)
    _check_text(tensors)
    return save({name: _stored(name, tensor) for name, tensor in tensors.items()})


def unpack_null_text(data: bytes) -> TextEmbedding:
    """Parse an embedding of `pack_null_text`; raise DataError if it is damaged."""
    tensors = _load(data)
    _check_types(tensors)
    _check_text(tensors)
    return TextEmbedding(tensors["text"].float(), tensors["mask"].bool())


def read_null_text(store: Store, facts: CacheFacts) -> TextEmbedding | None:
    """Read the embedding of the empty caption; None if the cache has no text.

    Raises:
        DataError: it is missing, damaged, or of another width than the cache's text.
    """
    if facts.null_text is None:
        return None
    try:
        null = unpack_null_text(store.get(facts.null_text))
    except DataError as error:
        raise DataError(f"{store.url}/{facts.null_text}: {error}; run `regen preencode` again") from error
    if null.text.shape[1] != facts.text_width:
        raise DataError(
            f"{store.url}/{facts.null_text}: embeddings of width {null.text.shape[1]}, the manifest says "
            f"{facts.text_width}; run `regen preencode` again"
        )
    return null


@dataclass(frozen=True)
class CacheFacts:
    """Description of the latents in a cache's manifest.

    `fingerprint` covers everything that determines the latents; `num_frames` is the frames of a clip (k + 1); `fps` the
    median frame rate of the encoded clips; `text` the description of the text encoder, with its `width`;
    `statistics` those of the latents, as JSON; `null_text` the name of the object with the empty caption's embedding.
    `text` and `null_text` are None in a cache without text.
    """

    url: str
    fingerprint: str
    num_frames: int
    channels: int
    fps: float
    encoder: Mapping[str, Any]
    preprocessing: Mapping[str, Any]
    text: Mapping[str, Any] | None
    statistics: Mapping[str, Any]
    null_text: str | None

    @classmethod
    def of(cls, manifest: DatasetManifest, url: str) -> CacheFacts:
        """Read the description from a manifest; raise DataError if it is not that of a cache."""
        only_latents(manifest, url)
        options = manifest.options
        try:
            return cls(
                url=url, fingerprint=str(options["fingerprint"]), num_frames=int(options["num_frames"]),
                channels=int(options["channels"]), fps=float(options["fps"]), encoder=dict(options["encoder"]),
                preprocessing=dict(options["preprocessing"]), text=options["text"] and dict(options["text"]),
                statistics=dict(options["statistics"]), null_text=options["null_text"],
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{url}: its manifest does not say what the latents are ({type(error).__name__}: {error}); run "
                "`regen preencode` again"
            ) from error

    @property
    def text_width(self) -> int | None:
        """Return the width D of the text embeddings; None in a cache without text."""
        return None if self.text is None else int(self.text["width"])

    def check(self, entry: LatentEntry, frames: int, height: int, width: int) -> None:
        """Raise DataError if an entry contradicts the manifest or its index row (frames, sides in pixels)."""
        found = tuple(entry.content.shape)
        n = max(1, frames // self.num_frames)
        cell = int(self.encoder.get("cell", SPATIAL_COMPRESSION))
        expected = (n, self.channels, height // cell, width // cell)
        if found != expected:
            raise DataError(f"content latents {_x(found)}, the index and the manifest say {_x(expected)}{_ALL_SUCH}")
        if entry.clips != frames // self.num_frames:
            raise DataError(f"motion latents of {entry.clips} clips, the index says {frames} frames{_ALL_SUCH}")
        motion = (self.channels * (int(self.encoder.get("latent_frames", 2)) - 1), *expected[2:])
        if tuple(entry.motion.shape[1:]) != motion:
            raise DataError(f"motion latents {_x(entry.motion.shape[1:])}, the manifest says {_x(motion)}{_ALL_SUCH}")
        text_width = None if entry.text is None else entry.text.shape[1]
        if text_width != self.text_width:
            raise DataError(f"text embeddings of width {text_width}, the manifest says {self.text_width}{_ALL_SUCH}")


def _load(data: bytes) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load(data)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise DataError(f"not a safetensors file, or a damaged one ({error}){_ALL_SUCH}") from error
    return tensors


def _metadata_of(data: bytes) -> dict[str, str]:
    """Return the metadata of the header, which `_load` has validated."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    try:
        words = json.loads(header.get("__metadata__", {}).get(_METADATA, "{}"))
        return {str(name): str(word) for name, word in words.items()}
    except (ValueError, AttributeError) as error:
        raise DataError(f"the metadata '{_METADATA}' is not a JSON object ({error}){_ALL_SUCH}") from error


def _text_tensors(text: Tensor | None) -> dict[str, Tensor]:
    return {} if text is None else {"text": text, "mask": torch.ones(len(text), dtype=torch.uint8)}


def _stored(name: str, tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", _DTYPES[name]).contiguous()


def _check_types(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype != _DTYPES.get(name):
            raise DataError(
                f"tensor '{name}' is {tensor.dtype}, expected is {_DTYPES.get(name, 'no such tensor')}{_ALL_SUCH}"
            )


def _check_shapes(tensors: Mapping[str, Tensor]) -> None:
    """Check the shapes of content and motion, and of text if there is any."""
    _check_dimensions(tensors)
    content, motion = tensors["content"].shape, tensors["motion"].shape
    if (
        not content[0]
        or content[2:] != motion[2:]
        or motion[1] % content[1]
        or motion[0] not in ({0, 1} if content[0] == 1 else {content[0]})
    ):
        raise DataError(
            f"content {_x(content)} and motion {_x(motion)} do not belong together; they are alike, or an image's: one "
            "content latent and no motion latent"
        )
    if "text" in tensors or "mask" in tensors:
        _check_text(tensors)


def _check_text(tensors: Mapping[str, Tensor]) -> None:
    missing = [name for name in ("text", "mask") if name not in tensors]
    if missing:
        raise DataError(f"there is no tensor '{missing[0]}' in it{_ALL_SUCH}")
    _check_dimensions(tensors)
    text, mask = tensors["text"].shape, tensors["mask"].shape
    if not text[0] or text[0] != mask[0]:
        raise DataError(f"text {_x(text)} and mask {_x(mask)} do not belong together; there is at least one token")


def _check_dimensions(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.ndim != _NDIM[name]:
            raise DataError(
                f"tensor '{name}' has the shape {_x(tensor.shape)}, expected are {_NDIM[name]} dimensions{_ALL_SUCH}"
            )


def _x(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "of one number"
