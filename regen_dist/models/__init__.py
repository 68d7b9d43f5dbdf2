"""The video embedders (encoder, latent conditioning, generative decoder, and the convolutional baseline), and the
text-to-video transformer on their latents."""

from regen_dist.models.embedder import Baseline, EmbedderBase, Regen, build_model
from regen_dist.models.encoder import Latents
from regen_dist.models.t2v import TextToVideo

__all__ = ["Baseline", "Latents", "Regen", "TextToVideo", "EmbedderBase", "build_model"]
