"""The video embedders: encoder, latent conditioning, generative decoder, and the convolutional baseline."""

from regen_dist.models.embedder import Baseline, Regen, VideoEmbedder, build_model
from regen_dist.models.encoder import Latents

__all__ = ["Baseline", "Latents", "Regen", "VideoEmbedder", "build_model"]
