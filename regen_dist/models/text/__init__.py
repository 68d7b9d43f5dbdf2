"""Text encoders: loading one, encoding captions, converting one, and making a small one. transformers is imported only
where a model is loaded or made, because that takes seconds."""

from regen_dist.models.text.encoder import TextEncoder
from regen_dist.models.text.files import convert_encoder
from regen_dist.models.text.small import make_small_encoder

__all__ = ["TextEncoder", "convert_encoder", "make_small_encoder"]
