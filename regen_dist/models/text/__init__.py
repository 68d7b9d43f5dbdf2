"""T5 text encoders: loading one, encoding captions, and making a small one. transformers is imported where a model is
loaded or made, for that takes seconds."""

from regen_dist.models.text.encoder import TextEncoder
from regen_dist.models.text.small import make_small_encoder

__all__ = ["TextEncoder", "make_small_encoder"]
