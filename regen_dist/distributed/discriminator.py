"""A small network that is trained beside the model: the discriminator of the adversarial loss.

It is whole on every rank, in float32, whatever the engine does with the model: some million parameters need no
sharding. Gradients are averaged over all ranks in one collective a step, so that all copies stay the same. Ranks that
share samples have the same gradients, and the mean over all ranks is that over the groups.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from regen_dist.config.embedder import EmbedderConfig
from regen_dist.config.losses import AdversarialConfig
from regen_dist.config.run import CommonConfig, OptimizerConfig
from regen_dist.distributed.optimizer import MOMENTS, build_optimizer, fresh_state, set_num_updates
from regen_dist.distributed.ranks import Ranks, chunk
from regen_dist.errors import RegenError
from regen_dist.models.perceptual import LogitAverages, PatchDiscriminator
from regen_dist.observe.terminal import warn

_KIND = "discriminator"  # of the pieces: its weights, and with a suffix its moments
_DECAY = 0.99  # of the logits' averages
_SEED = 0x64697363  # apart from the model's, whose weights are drawn with `train.seed`


def build_discriminator_trainer(config: CommonConfig, ranks: Ranks) -> DiscriminatorTrainer | None:
    """Build the discriminator that a config asks for; None if the adversarial loss is off."""
    if not isinstance(config, EmbedderConfig) or config.train.losses.adversarial.weight == 0:
        return None
    adversarial = config.train.losses.adversarial

    def build() -> nn.Module:
        """Build the same discriminator on every rank; the process's own generator is left alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.train.seed ^ _SEED)
            return PatchDiscriminator(adversarial)

    return DiscriminatorTrainer(build, adversarial, ranks, config.train.accumulation)


class DiscriminatorTrainer:
    """The discriminator with its optimizer.

    Args:
        build: makes it with fresh weights, the same on every rank.
        config: its optimizer's numbers.
        ranks: ranks of the job.
        accumulation: micro-batches of a step.

    Attributes:
        module: the network.
        averages: running averages of the logits; None before the first update.
        num_updates: number of updates made.
        skipped: updates that were left out, because a gradient was not finite.
    """

    def __init__(
        self, build: Callable[[], nn.Module], config: AdversarialConfig, ranks: Ranks, accumulation: int
    ) -> None:
        self._build, self._config, self._ranks, self._accumulation = build, config, ranks, accumulation
        self.module = build().to(ranks.device)
        self._params = dict(self.module.named_parameters())
        settings = OptimizerConfig(lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)
        self._optimizer = build_optimizer(settings, self._params.values(), ranks.device)
        for param in self._params.values():
            self._optimizer.state[param] = fresh_state(settings, param)
        self.averages: LogitAverages | None = None
        self.num_updates = self.skipped = 0
        self._logits: list[Tensor] = []  # mean of each micro-batch, of sources and of reconstructions

    def backward(self, loss: Tensor, real: Tensor, fake: Tensor) -> None:
        """Accumulate the gradients of a micro-batch."""
        (loss / self._accumulation).backward()
        self._logits.append(torch.stack([real.detach().mean(), fake.detach().mean()]).float())

    @torch.no_grad()
    def step(self, applied: bool) -> None:
        """Average the gradients over the ranks, clip, update, clear. A collective if there are gradients, which depends
        on the step alone and is the same on every rank.

        Args:
            applied: true if the model's own update was made; else this one is not made either.
        """
        if not self._logits:
            return
        # Gradients and logits in one tensor, so that one collective averages both.
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._params.values()]
        flat = torch.cat([*(grad.flatten() for grad in grads), torch.stack(self._logits).mean(0)])
        self._logits = []
        if self._ranks.world_size > 1:
            dist.all_reduce(flat)
            flat /= self._ranks.world_size
        norm, (real, fake) = float(flat[:-2].norm()), flat[-2:].tolist()
        if applied and all(map(isfinite, (norm, real, fake))):
            flat *= min(1.0, self._config.clip_norm / (norm + 1e-6))
            parts = flat[:-2].split([grad.numel() for grad in grads])
            for param, part in zip(self._params.values(), parts, strict=True):
                param.grad = part.view_as(param)
            self._optimizer.step()
            self._note(LogitAverages(real, fake))
        elif applied:
            self.skipped += 1
            if self.skipped == 1:
                warn(
                    f"the discriminator's update was skipped, as later ones will be: its gradients have the norm {norm}"
                )
        self._optimizer.zero_grad(set_to_none=True)

    def pieces(self) -> dict[str, Tensor]:
        """Return this rank's share of everything that a checkpoint must hold: views."""
        world_size, rank = self._ranks.world_size, self._ranks.rank
        return {
            name: tensor[slice(*chunk(len(tensor), world_size, rank))] for name, tensor in self._flat_tensors().items()
        }

    def state(self) -> dict[str, Any]:
        """Return the state that a checkpoint holds beside the pieces: plain values, which JSON restores bit for bit."""
        return {
            "num_updates": self.num_updates,
            "skipped": self.skipped,
            "averages": None if self.averages is None else list(self.averages),
            "shapes": self.shapes(),
        }

    @torch.no_grad()
    def restore(self, source: Any, state: dict[str, Any] | None) -> None:
        """Go on from a checkpoint of any number of ranks. A collective.

        Args:
            source: reads pieces (`engine.PieceSource`), of the shapes in `state`.
            state: the checkpoint's state; None if it has no discriminator, so that a new one begins.

        Raises:
            RegenError: some rank could not read it; on every rank.
        """
        self._optimizer.zero_grad(set_to_none=True)
        self._logits = []
        tensors, error = self._flat_tensors(), None
        if state is None:
            self.module.load_state_dict(self._build().state_dict())
            for name, tensor in tensors.items():
                if not name.startswith(f"{_KIND}/"):
                    tensor.zero_()
            state = {}
        else:
            try:
                for name, stored in source.read_all({name: (0, len(tensor)) for name, tensor in tensors.items()}):
                    tensors[name].copy_(stored)
            except RegenError as caught:
                error = caught
        self._ranks.raise_together(error)
        self.num_updates, self.skipped = state.get("num_updates", 0), state.get("skipped", 0)
        averages = state.get("averages")
        self.averages = None if averages is None else LogitAverages(*averages)
        set_num_updates(self._optimizer, self.num_updates)

    def shapes(self) -> dict[str, list[int]]:
        return {name: list(param.shape) for name, param in self._params.items()}

    def _flat_tensors(self) -> dict[str, Tensor]:
        """Return every flat parameter and moment, by the name of its piece: views."""
        weights = {f"{_KIND}/{name}": param.detach().view(-1) for name, param in self._params.items()}
        moments = {
            f"{_KIND}_{moment}/{name}": self._optimizer.state[param][moment].view(-1)
            for moment in MOMENTS
            for name, param in self._params.items()
        }
        return weights | moments

    def _note(self, found: LogitAverages) -> None:
        """Record an update, made at these mean logits of the global batch."""
        self.num_updates += 1
        before = self.averages or found
        self.averages = LogitAverages(*(_DECAY * a + (1 - _DECAY) * b for a, b in zip(before, found, strict=True)))
