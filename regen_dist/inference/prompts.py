"""Prompts: read from a file, and embedded as the captions of the caches were.

Legend: L tokens of one prompt, D their width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from regen_dist.config.text import TextConfig
from regen_dist.errors import CheckpointError, DataError
from regen_dist.inference.space_files import LatentSpace
from regen_dist.models.text import TextEncoder


class Prompt(NamedTuple):
    """A prompt and its number: its place in the file, which its noise is keyed by, as by seed + `sample`."""

    number: int
    text: str
    sample: int = 0  # of several videos of it, from 0


class CaptionEncoder(Protocol):
    """What is needed of a text encoder: `regen_dist.models.text.TextEncoder`, or a stand-in."""

    @property
    def fingerprint(self) -> str:
        """Of everything that decides its embeddings."""

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """Embeddings [L, D]."""

    def cuts(self, caption: str) -> bool:
        """Whether a caption is too long."""


class Embedded(NamedTuple):
    """Embeddings [L, D] of some prompts and of what guidance leads away from, float32 on the CPU; and the prompts that
    were cut."""

    texts: list[Tensor]
    null: Tensor
    cut: list[str]


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a text file, one a line; empty lines have no number.

    Raises:
        DataError: there is no such file, it is no text, or there is nothing in it.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read prompts from {path}: {error}") from error
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise DataError(f"{path} holds no prompt; write one a line")
    return [Prompt(number, text) for number, text in enumerate(texts)]


def load_text_encoder(space: LatentSpace, path: str | None, device: torch.device) -> TextEncoder:
    """The text encoder that the caches were made with; `path` says where it is, if not where it was.

    Raises:
        CheckpointError: it is not there, or the caches do not say which one it was.
        BackendError: a package that it needs is not installed.
    """
    facts = space.facts["text"] or {}
    name = path or facts.get("encoder")
    if name is None:
        raise CheckpointError("the caches do not say which text encoder they were made with; give it with --text")
    longest = TextConfig(max_tokens=int(facts.get("max_tokens", TextConfig().max_tokens))).max_tokens
    return TextEncoder.load(TextConfig(encoder=str(name), max_tokens=longest), device)


def embed_prompts(
    encoder: CaptionEncoder, space: LatentSpace, prompts: Sequence[Prompt], negative: str | None = None
) -> Embedded:
    """Embed prompts, rounded as they are in a cache.

    Args:
        encoder: must be the one that the caches were made with.
        space: of the caches.
        prompts: to embed; too long ones are cut.
        negative: what guidance leads away from; None takes the caches' empty caption.

    Raises:
        CheckpointError: it is another encoder.
    """
    check_text_encoder(encoder, space)
    texts = [prompt.text for prompt in prompts]
    found = [as_in_cache(each) for each in encoder.encode(texts)]
    null = space.null_text.text if negative is None else as_in_cache(encoder.encode([negative])[0])
    asked = texts if negative is None else [*texts, negative]
    return Embedded(found, null, [text for text in asked if encoder.cuts(text)])


def check_text_encoder(encoder: CaptionEncoder, space: LatentSpace) -> None:
    """CheckpointError when an encoder is not the one that the caches were made with."""
    wanted = (space.facts["text"] or {}).get("fingerprint")
    if encoder.fingerprint != wanted:
        raise CheckpointError(
            f"the text encoder is not the one that the caches were made with (fingerprint {encoder.fingerprint[:16]}…, "
            f"theirs is {str(wanted)[:16]}…); give that one with --text"
        )


def as_in_cache(text: Tensor) -> Tensor:
    """An embedding, rounded as a cache stores it."""
    return text.to("cpu", torch.bfloat16).float()
