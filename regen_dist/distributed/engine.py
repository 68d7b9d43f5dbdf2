"""Interface of the engines that run a training step, and the one in plain PyTorch.

An engine keeps float32 master weights, the optimizer's moments and the weights' moving average (EMA); the forward and
backward passes run in the configured precision. State is exposed as *pieces*: for every parameter the flat chunk that
this rank holds (`ranks.chunk`), which is how ZeRO-3 lays it out, so that a checkpoint is made and read without
communication.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from math import isfinite, prod
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn as nn
from torch import Tensor

from regen_dist.config.run import CommonConfig
from regen_dist.distributed.discriminator import build_discriminator_trainer
from regen_dist.distributed.optimizer import OPTIMIZERS, build_optimizer, fresh_state, set_lr, set_num_updates
from regen_dist.distributed.ranks import Ranks, chunk
from regen_dist.distributed.sequence_parallel import RowGroup
from regen_dist.errors import RegenError
from regen_dist.models.layers import Checkpointed

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

    def named_masters(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's flat float32 piece of every parameter, without padding: a view that updates write through."""
        return ((name, self._own(name, None)) for name, _ in self.module.named_parameters())

    def named_moments(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's flat piece of every moment, named `<moment>/<parameter>`: views."""
        names = [name for name, _ in self.module.named_parameters()]
        return ((f"{moment}/{name}", self._own(name, moment)) for moment in self.moments for name in names)

    def shapes(self) -> dict[str, list[int]]:
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
    def _own(self, name: str, moment: str | None) -> Tensor:
        """Return this rank's flat piece of a parameter's master or moment, without padding: a view."""

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


# Plain PyTorch in one process: the reference that ZeRO-3 is compared with.

BACKEND = "inductor"
# Compilations of one kind of block before it is left as it is: one for each shape of a batch (images, clips, every
# bucket), with gradients and without.
_MOST_SHAPES = 64


class PlainEngine(Engine):
    """One process, no DeepSpeed: working weights in the configured precision, float32 masters beside them. In float32
    the masters are the working weights themselves."""

    def __init__(self, config: CommonConfig, ranks: Ranks, build: Callable[[], nn.Module]) -> None:
        super().__init__(config, ranks)
        self._sums: dict[str, Tensor] = {}  # float32 gradients of this step's micro-batches; empty where there is one
        self.module = build().to(ranks.device)
        self._masters = {name: param.detach().float() for name, param in self.module.named_parameters()}
        self.optimizer = build_optimizer(config.optimizer, list(self._masters.values()), ranks.device)
        self.module.to(precision_of(config.engine.precision))
        for master in self._masters.values():
            self.optimizer.state[master] = fresh_state(config.optimizer, master)
        self._start()
        if config.engine.compile:
            compile_blocks(self.module)

    def backward(self, loss: Tensor, is_last: bool) -> None:
        (loss / self.config.train.accumulation).backward()
        if self.config.engine.precision == "fp32" or (is_last and not self._sums):
            return
        for name, param in self.module.named_parameters():  # autograd would round every sum to bf16
            if param.grad is not None:
                own, param.grad = param.grad.float(), None
                self._sums[name] = self._sums[name].add_(own) if name in self._sums else own

    def named_gradients(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, self._gradient(name, param).view(-1)) for name, param in self.module.named_parameters())

    def _own(self, name: str, moment: str | None) -> Tensor:
        master = self._masters[name]
        tensor: Tensor = master if moment is None else self.optimizer.state[master][moment]
        return tensor.view(-1)

    def _forward(self, *args: Any) -> Any:
        return self.module(*args)

    @torch.no_grad()
    def _update(self, lr: float) -> StepResult:
        params = dict(self.module.named_parameters())
        grads = [self._gradient(name, params[name]) for name in self._masters]
        norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))))
        self.module.zero_grad(set_to_none=True)
        self._sums = {}
        if not isfinite(norm):
            return StepResult(False, norm)
        if (scale := self.config.optimizer.clip_norm / (norm + 1e-6)) < 1:
            torch._foreach_mul_(grads, scale)
        for master, grad in zip(self._masters.values(), grads, strict=True):
            master.grad = grad
        set_lr(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._refresh_weights()
        return StepResult(True, norm)

    def _gradient(self, name: str, param: nn.Parameter) -> Tensor:
        """The gradient in float32; zeros where the parameter took no part (the motion path of a batch of images)."""
        if name in self._sums:
            return self._sums[name]
        return torch.zeros_like(param, dtype=torch.float32) if param.grad is None else param.grad.float()

    def _refresh_weights(self) -> None:
        if self.config.engine.precision == "fp32":
            return
        params = dict(self.module.named_parameters())
        torch._foreach_copy_([params[name].data for name in self._masters], list(self._masters.values()))

    def _after_restore(self) -> None:
        set_num_updates(self.optimizer, self.num_updates)
        self._refresh_weights()


# --- torch.compile of blocks: they are where the time goes and are alike, so that one compilation serves them all ---


def compile_blocks(model: nn.Module) -> None:
    """Compile the blocks of every `Checkpointed` part of a model, at their first call for each shape.

    In place (`nn.Module.compile`): the names of parameters, and so checkpoints, stay as they are.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_SHAPES)
    for block in blocks_of(model):
        block.compile(backend=BACKEND, dynamic=False)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the blocks that `Checkpointed` parts run one after the other."""
    owners = [module for module in model.modules() if isinstance(module, Checkpointed)]
    lists = [child for owner in owners for child in owner.children() if isinstance(child, nn.ModuleList)]
    return [block for blocks in lists for block in blocks]
