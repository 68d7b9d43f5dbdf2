"""Check that the networks named in `train.losses` can be read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from regen_dist.checks.findings import Finding, Target, error
from regen_dist.config import AnyRunConfig, T2VConfig
from regen_dist.errors import ConfigError


def losses(config: AnyRunConfig, target: Target) -> Iterator[Finding]:
    """Check the feature network of the perceptual loss."""
    if isinstance(config, T2VConfig) or config.train.losses.perceptual.weight == 0:
        return
    settings, key = config.train.losses.perceptual, "train.losses.perceptual.network"
    if settings.network is None or target.will_be_there(settings.network):
        return
    try:
        import torch

        from regen_dist.models.perceptual import load_perceptual
    except ImportError:  # no torch on this machine
        if not Path(settings.network).expanduser().is_file():
            yield error(key, f"{key}={settings.network} is no file; correct the path")
        return
    smallest = min(min(size) for size in config.data.sizes)
    try:
        load_perceptual(settings.network, torch.device("cpu"), sha256=settings.sha256, smallest=smallest)
    except ConfigError as caught:
        yield error(key, str(caught))
