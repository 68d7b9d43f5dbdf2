"""Text encoders, by what a config says of them. Imports no torch."""

from __future__ import annotations

from regen_dist.config.section import PositiveInt, Section


class TextConfig(Section):
    """A T5 encoder with its sentencepiece tokenizer: a folder (`regen text make` writes a small one), or a name on the
    Hugging Face hub."""

    encoder: str = "google/t5-v1_1-xxl"
    max_tokens: PositiveInt = 256  # longer captions are cut


__all__ = ["TextConfig"]
