"""A trained text-to-video model for inference: from a run, or from an exported model.

Legend: B samples, C channels, F latent frames, h x w latent cells.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regen_dist.checkpoint.export import (
    Weights,
    check_weights,
    checkpoint_weights,
    find_checkpoint,
    is_export,
    model_with,
    open_run,
    read_model,
)
from regen_dist.checkpoint.manifest import Manifest
from regen_dist.config import T2VConfig, config_hash
from regen_dist.config.exported import OriginConfig, T2VExportConfig, load_t2v_export_config
from regen_dist.config.loading import t2v_only
from regen_dist.config.section import SamplerName
from regen_dist.diffusion.given import Given
from regen_dist.distributed.base import precision_of
from regen_dist.errors import CheckpointError
from regen_dist.inference.latent_sampling import Text, sample_latents
from regen_dist.inference.latent_space import NormalisedLatents
from regen_dist.inference.space_files import LatentSpace, read_space
from regen_dist.models import TextToVideo, build_model


class TextToVideoModel:
    """A text-to-video model with the latent space that it works in. Computes in the precision that it was trained in.

    Args:
        model: with its weights.
        config: of it.
        space: of the caches that it was trained on.
        device: where it works.
        origin: what a record says of the weights: run, step and so on.
    """

    def __init__(
        self, model: TextToVideo, config: T2VExportConfig, space: LatentSpace, device: torch.device,
        origin: Mapping[str, Any],
    ) -> None:  # fmt: skip
        self.config, self.space, self.device, self._origin = config, space, device, dict(origin)
        self.model = model.to(device, precision_of(config.precision)).eval()

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
        path = Path(path)
        device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        load = cls._of_export if is_export(path) else cls._of_run
        return load(path, weights, device, untrained)

    @classmethod
    def _of_run(cls, run: Path, weights: Weights | None, device: torch.device, untrained: bool) -> TextToVideoModel:
        found, folder = open_run(run)
        config, weights = t2v_only(found, str(run)), weights or "ema"
        exported, space = T2VExportConfig.of(config, weights), read_space(run)
        if untrained:
            return cls(_fresh(exported), exported, space, device, _untrained(config.name, config_hash(config)))
        manifest = find_checkpoint(folder, checksums=False)
        tensors = checkpoint_weights(folder, manifest, weights)
        model = model_with(config.model, tensors, f"the parameters of step {manifest.step} in {folder.url}")
        return cls(model, exported, space, device, _told(config, manifest, weights))

    @classmethod
    def _of_export(
        cls, folder: Path, weights: Weights | None, device: torch.device, untrained: bool
    ) -> TextToVideoModel:
        config, space = load_t2v_export_config(folder), read_space(folder)
        check_weights(folder, config, weights)
        name, digest = (config.origin.run, config.origin.config_hash) if config.origin else (folder.name, None)
        if untrained:
            return cls(_fresh(config), config, space, device, _untrained(name, digest))
        model = model_with(config.model, read_model(folder, config), f"the parameters in {folder}")
        return cls(model, config, space, device, _of_origin(config.origin, config, folder.name))

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
            self.model, noise, text, null, self.config.diffusion,
            steps=steps, guidance=guidance, sampler=sampler, given=given,
        )  # fmt: skip
        if not bool(torch.isfinite(made.frames).all()):
            raise CheckpointError(
                f"the model of step {self._origin.get('step', '?')} generates latents that are not finite: its "
                "weights, or the guidance, are broken. Take an earlier checkpoint, or train on from one with a lower "
                "optimizer.lr"
            )
        return made

    def facts(self) -> dict[str, Any]:
        """What a record says of the weights. A run and what was exported from it, unrounded, say the same."""
        return dict(self._origin)


def _fresh(config: T2VExportConfig) -> TextToVideo:
    """As training begins, whatever torch's own generator did; it stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return build_model(config.model)


def _untrained(run: str, digest: str | None) -> dict[str, Any]:
    return {"run": run, "step": 0, "weights": "untrained", "config_hash": digest}


def _told(config: T2VConfig, manifest: Manifest, weights: str) -> dict[str, Any]:
    return {
        "run": config.name,
        "step": manifest.step,
        "weights": weights,
        "dtype": "float32",
        "config_hash": manifest.config_hash,
        "saved_at": manifest.saved_at,
        "version": manifest.version,
    }


def _of_origin(origin: OriginConfig | None, config: T2VExportConfig, name: str) -> dict[str, Any]:
    """The same of an export; one without an origin is known by its checksum alone."""
    told: dict[str, Any] = {"run": name, "sha256": config.sha256} if origin is None else origin.model_dump(mode="json")
    facts = {"weights": config.weights, "dtype": config.dtype} | told
    return {name: value for name, value in facts.items() if name not in ("samples", "data", "metrics")}
