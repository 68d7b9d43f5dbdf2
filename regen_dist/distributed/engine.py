"""Interface of the engines that run a training step.

An engine keeps float32 master weights, the optimizer's moments and the weights' moving average (EMA); the forward and
backward passes run in the configured precision. State is exposed as *pieces*: for every parameter the flat chunk that
this rank holds (`ranks.chunk`), which is how ZeRO-3 lays it out, so that a checkpoint is made and read without
communication.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn as nn
from torch import Tensor

from regen_dist.config.run import CommonConfig
from regen_dist.distributed.discriminator import build_discriminator_trainer
from regen_dist.distributed.optimizer import OPTIMIZERS
from regen_dist.distributed.ranks import Ranks, chunk
from regen_dist.distributed.sequence_parallel import RowGroup
from regen_dist.errors import RegenError

Pieces = dict[str, Tensor]  # "<kind>/<parameter>" to a flat float32 tensor: kind is of WEIGHTS or of the optimizer
WEIGHTS = ("master", "ema")  # kinds that every engine has


class PieceSource(Protocol):
    """Source of stored pieces."""

    def read_all(self, wanted: Mapping[str, tuple[int, int]]) -> Iterator[tuple[str, Tensor]]:
        """Elements low..high of the flat parameter behind each key ("<kind>/<parameter>"), in the order given."""


class StepResult(NamedTuple):
    """Result of an optimizer step. `applied` is False if a gradient was not finite on some rank; then nothing changed
    on any rank."""

    applied: bool
    grad_norm: float


class Engine(ABC):
    """One rank's share of the model and of its optimizer."""

    module: nn.Module
    ema: Pieces

    def __init__(self, config: CommonConfig, ranks: Ranks) -> None:
        self.config, self.ranks, self.num_updates = config, ranks, 0
        self.moments = OPTIMIZERS[config.optimizer.kind].state  # kinds that the optimizer adds
        self.rows = RowGroup(ranks)  # which ranks share samples with this one
        self.discriminator = build_discriminator_trainer(config, ranks)  # None without an adversarial loss

    def __call__(self, *args: Any) -> Any:
        """The module's forward pass."""
        return self._forward(*args)

    def step(self, lr: float) -> StepResult:
        """Clip, update the weights and their EMA, clear the gradients; the same for the discriminator."""
        result = self._update(lr)
        if result.applied:
            self.num_updates += 1
            self._update_ema()
        if self.discriminator is not None:
            self.discriminator.step(result.applied)
        return result

    @abstractmethod
    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Accumulate the gradients of one micro-batch; `is_last` closes the accumulation."""

    @abstractmethod
    def named_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Return this rank's flat float32 piece of every parameter's gradient, without padding, averaged over
        micro-batches and ranks, before clipping. Call it between the last `backward` of a step and its `step`."""

    @abstractmethod
    def named_masters(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's flat float32 piece of every parameter, without padding: a view that updates write through."""

    @abstractmethod
    def named_moments(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's flat piece of every moment, named `<moment>/<parameter>`: views."""

    def shapes(self) -> dict[str, list[int]]:
        """Return the full shape of every parameter."""
        return self._shapes

    def pieces(self) -> Pieces:
        """Return everything that a checkpoint must hold of this rank: views, valid until the next step."""
        return self._model_pieces() | ({} if self.discriminator is None else self.discriminator.pieces())

    def _model_pieces(self) -> Pieces:
        masters = {f"master/{name}": tensor for name, tensor in self.named_masters()}
        return masters | {f"ema/{name}": tensor for name, tensor in self.ema.items()} | dict(self.named_moments())

    @torch.no_grad()
    def restore(self, source: PieceSource, num_updates: int) -> None:
        """Fill every piece of the model of this rank, and refresh what is derived from them; the discriminator has its
        own `restore`. A collective.

        Raises:
            RegenError: some rank could not read its pieces; on every rank. The state is then half the old one.
        """
        pieces, error = self._model_pieces(), None
        try:
            for name, stored in source.read_all({name: self._range(name) for name in pieces}):
                pieces[name].copy_(stored)
        except RegenError as caught:
            error = caught
        self.ranks.raise_together(error)
        self.num_updates = num_updates
        self._after_restore()

    def _range(self, piece_name: str) -> tuple[int, int]:
        """Return the range of elements of the flat parameter that a piece of this rank holds."""
        size = prod(self._shapes[piece_name.split("/", 1)[1]])
        return chunk(size, self.ranks.world_size, self.ranks.rank)

    @abstractmethod
    def _forward(self, *args: Any) -> Any: ...

    @abstractmethod
    def _update(self, lr: float) -> StepResult: ...

    @abstractmethod
    def _after_restore(self) -> None: ...

    def _start(self) -> None:
        """Initialise the shapes and the EMA. Call it once the module and the masters exist."""
        self._shapes = {name: list(full_shape(param)) for name, param in self.module.named_parameters()}
        self._live = dict(self.named_masters())
        self.ema = {name: tensor.detach().clone() for name, tensor in self._live.items()}

    @torch.no_grad()
    def _update_ema(self) -> None:
        """Move the average towards the weights, faster at first so that it forgets the initialisation. No
        communication."""
        decay = min(self.config.train.ema_decay, (1 + self.num_updates) / (10 + self.num_updates))
        torch._foreach_lerp_(list(self.ema.values()), list(self._live.values()), 1 - decay)


def precision_of(name: str) -> torch.dtype:
    """Return the dtype of the working weights: `bf16` or `fp32`."""
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]


def full_shape(param: Tensor) -> torch.Size:
    """Return a parameter's full shape, sharded or not."""
    return getattr(param, "ds_shape", param.shape)
