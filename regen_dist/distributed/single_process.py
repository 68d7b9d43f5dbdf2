"""Plain PyTorch in one process: the reference that ZeRO-3 is compared with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from regen_dist.config.run import CommonConfig
from regen_dist.distributed.engine import Engine, StepResult, precision_of
from regen_dist.distributed.optimizer import build_optimizer, fresh_state, set_lr, set_num_updates
from regen_dist.distributed.ranks import Ranks
from regen_dist.models.layers import Checkpointed

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

    def named_masters(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, master.view(-1)) for name, master in self._masters.items())

    def named_moments(self) -> Iterator[tuple[str, Tensor]]:
        return (
            (f"{moment}/{name}", self.optimizer.state[master][moment].view(-1))
            for moment in self.moments
            for name, master in self._masters.items()
        )

    def _forward(self, *args: Any) -> Any:
        return self.module(*args)

    @torch.no_grad()
    def _update(self, lr: float) -> StepResult:
        params = dict(self.module.named_parameters())
        grads = [self._gradient(name, params[name]) for name in self._masters]
        norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))))
        self.module.zero_grad(set_to_none=True)
        self._sums = {}
        if not math.isfinite(norm):
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
