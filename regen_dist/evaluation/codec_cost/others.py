"""The video codecs of diffusers, by their default configs, with random weights: this is about cost."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import Tensor

_BITS = 16  # of a latent's value


class DiffusersCoder:
    """A variational autoencoder of diffusers; the mean of the latents is what is kept.

    Args:
        name: its class.
        options: beside the defaults.

    Raises:
        ImportError: diffusers is not installed.
    """

    def __init__(self, name: str, **options: Any) -> None:
        self.model = getattr(import_module("diffusers"), name)(**options).eval()

    def encode(self, video: Tensor) -> Tensor:
        """[1, 3, T, H, W] to [1, C, t, h, w]."""
        mean: Tensor = self.model.encode(video).latent_dist.mode()
        return mean

    def decode(self, latents: Tensor) -> Tensor:
        """[1, C, t, h, w] to [1, 3, T, H, W]."""
        video: Tensor = self.model.decode(latents).sample
        return video

    def bits(self, latents: Tensor) -> int:
        """Of what is kept."""
        return _BITS * latents.numel()


def diffusers_coder(name: str, **options: Any) -> Callable[[], DiffusersCoder]:
    """Makes the codec when it is called."""
    return lambda: DiffusersCoder(name, **options)
