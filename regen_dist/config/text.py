"""Text encoders, by what a config says of them. Imports no torch."""

from __future__ import annotations

from regen_dist.config.section import PositiveInt, Section


class TextConfig(Section):
    """A text encoder and its tokenizer, such as a T5 or whatever else transformers loads: a folder (`regen text make`
    writes a small one, `regen text convert` one of pickled weights), or a name on the Hugging Face hub."""

    encoder: str = "google/t5-v1_1-xxl"
    max_tokens: PositiveInt = 256  # longer captions are cut


__all__ = ["TextConfig"]
