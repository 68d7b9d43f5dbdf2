"""Memory that the networks of `train.losses` need beside the model's, for `regen describe`."""

from __future__ import annotations

import torch

from regen_dist.config.losses import AdversarialConfig, LossesConfig
from regen_dist.models.discriminator import PatchDiscriminator
from regen_dist.models.flops import count_pass
from regen_dist.models.perceptual import load_perceptual

_STATES = 5  # float32 numbers a parameter: weight, gradient, two moments, and the flat gradient that ranks average
_R1 = 3  # passes that a penalty of gradients keeps: the pass itself, and its gradient with a graph of its own


def loss_memory_bytes(losses: LossesConfig, clip: tuple[int, int, int, int], clips_per_gpu: int) -> dict[str, int]:
    """Bytes per GPU by what for; empty where the terms are off. Nothing of it is sharded.

    Args:
        losses: losses of the config.
        clip: channels, frames, height and width that the decoder gives.
        clips_per_gpu: clips of one micro-batch.

    Raises:
        ConfigError: the perceptual network's file cannot be read.
    """
    terms: dict[str, int] = {}
    if losses.adversarial.weight > 0:
        states, activations = _discriminator(losses.adversarial, clip)
        # Sources and reconstructions together, for its own loss; afterwards the reconstructions, for the model's.
        passes = 1 + (_R1 if losses.adversarial.regularisation == "r1" else 1)
        terms["discriminator (fp32, on every GPU)"] = states
        terms["activations of the discriminator"] = passes * clips_per_gpu * activations
    if losses.perceptual.weight > 0:
        weights, activations = _perceptual(losses, clip)
        terms["perceptual network (fp32, on every GPU)"] = weights
        terms["activations of the perceptual network"] = clips_per_gpu * activations
    return terms


def _discriminator(config: AdversarialConfig, clip: tuple[int, int, int, int]) -> tuple[int, int]:
    """Bytes of its states, and what one pass of one clip keeps for the backward pass."""
    with torch.device("meta"):
        module = PatchDiscriminator(config)
        video = torch.empty(1, *clip, requires_grad=True)
    kept = count_pass(module, lambda: module(video), activation_checkpointing=False).activation_bytes
    return _STATES * 4 * sum(parameter.numel() for parameter in module.parameters()), kept


def _perceptual(losses: LossesConfig, clip: tuple[int, int, int, int]) -> tuple[int, int]:
    """Bytes of its weights, and what the compared frames of one clip keep."""
    settings = losses.perceptual
    assert settings.network is not None, "what the config refuses"
    network = load_perceptual(settings.network, torch.device("cpu"), sha256=settings.sha256)
    _, frames, height, width = clip
    compared = frames if settings.frames is None else min(settings.frames, frames)
    return network.num_bytes, compared * network.activation_bytes(height, width)
