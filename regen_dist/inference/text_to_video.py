"""A trained text-to-video model for inference: from a run, or from an exported model.

Legend: B samples, C channels, F latent frames, h x w latent cells.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regen_dist.checkpoint.export import Weights, model_with
from regen_dist.checkpoint.load_model import find_t2v
from regen_dist.config.exported import T2VExportConfig
from regen_dist.config.section import SamplerName
from regen_dist.diffusion.given import Given
from regen_dist.distributed.base import precision_of
from regen_dist.errors import CheckpointError
from regen_dist.inference.latent_sampling import Text, sample_latents
from regen_dist.inference.latent_space import NormalisedLatents
from regen_dist.inference.space_files import LatentSpace, read_space
from regen_dist.models import TextToVideo, build_model
from regen_dist.observe.devices import choose_device


class TextToVideoModel:
    """A text-to-video model with the latent space that it works in. Computes in the precision that it was trained in.

    Args:
        model: with its weights.
        config: of it.
        space: of the caches that it was trained on.
        device: where it works.
        origin: what a record says of the weights: run, step and so on.
        dtype: in which it computes, where not in that.
    """

    def __init__(
        self, model: TextToVideo, config: T2VExportConfig, space: LatentSpace, device: torch.device,
        origin: Mapping[str, Any], dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self.config, self.space, self.device, self._origin = config, space, device, dict(origin)
        self.model = model.to(device, dtype or precision_of(config.precision)).eval()

    @classmethod
    def load(
        cls,
        path: str | Path,
        weights: Weights | None = None,
        device: torch.device | None = None,
        *,
        untrained: bool = False,
    ) -> TextToVideoModel:
        """A text-to-video model out of a run folder or an exported one. Nothing is unpickled.

        Args:
            path: a run folder, whose newest good checkpoint is taken; or what `regen checkpoint export` wrote.
            weights: the averaged ones (`ema`) or those of the last step (`plain`); None takes the averaged ones of a
                run, and of an export those that are in it.
            device: CUDA where there is one, by default.
            untrained: take the weights that training began with instead, as a control.

        Raises:
            CheckpointError: there is no checkpoint, it or the latent space is damaged or missing; an export has other
                weights than those asked for, or is an embedder.
            ConfigError: the folder is neither a run of text to video nor an export.
        """
        found, device = find_t2v(path, weights), device or choose_device()
        space = read_space(found.path)
        if untrained:
            facts = {"run": found.name, "step": 0, "weights": "untrained", "config_hash": found.config_hash}
            return cls(_fresh(found.config), found.config, space, device, facts)
        model = model_with(found.config.model, found.weights(), found.what)
        return cls(model, found.config, space, device, found.facts())

    @property
    def channels(self) -> int:
        """C."""
        return self.config.model.latent_channels

    def sample(
        self,
        noise: Tensor,
        text: Text,
        null: Text,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: SamplerName | None = None,
        given: Given | None = None,
    ) -> NormalisedLatents:
        """Normalised latents [B, C, F, h, w] from noise of that shape; see `sample_latents`. What is not given is as
        the run's config says. `space.scale.restore` makes of them what a codec decodes."""
        made = sample_latents(
            self.predict, noise, text, null, self.config.diffusion,
            steps=steps, guidance=guidance, sampler=sampler, given=given,
        )  # fmt: skip
        if not bool(torch.isfinite(made.frames).all()):
            raise CheckpointError(
                f"the model of step {self._origin.get('step', '?')} generates latents that are not finite: its "
                "weights, or the guidance, are broken. Take an earlier checkpoint, or train on from one with a lower "
                "optimizer.lr"
            )
        return made

    def predict(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """The velocity at x_t; see `TextToVideo`."""
        return self.model(x, t, text, mask)  # type: ignore[no-any-return]

    def facts(self) -> dict[str, Any]:
        """What a record says of the weights. A run and what was exported from it, unrounded, say the same."""
        return dict(self._origin)


def _fresh(config: T2VExportConfig) -> TextToVideo:
    """As training begins, whatever torch's own generator did; it stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return build_model(config.model)
