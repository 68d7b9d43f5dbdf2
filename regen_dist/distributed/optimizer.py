"""AdamW behind one function: torch's fused one by default, DeepSpeed's CPU Adam or apex's FusedAdam where they run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regen_dist.config.run import OptimizerConfig
from regen_dist.errors import BackendError
from regen_dist.registry import Entry, Registry, Site

MOMENTS = ("exp_avg", "exp_avg_sq")


Groups = list[dict[str, Any]]
Maker = Callable[[Groups, OptimizerConfig, torch.device], torch.optim.Optimizer]


def build_optimizer(
    config: OptimizerConfig, params: Iterable[Tensor], device: torch.device, engine: str = "plain"
) -> torch.optim.Optimizer:
    """Build the optimizer that the config names. Matrices and kernels decay; vectors (biases, norm gains, tables of one
    row) do not.

    Args:
        config: the kind and its numbers.
        params: parameters to update.
        device: device of the parameters.
        engine: kind of the engine that calls its `step`.

    Raises:
        BackendError: the optimizer cannot run on this device or is not installed.
    """
    params = list(params)
    decayed = [p for p in params if len(getattr(p, "ds_shape", p.shape)) > 1]
    rest = [p for p in params if len(getattr(p, "ds_shape", p.shape)) <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return OPTIMIZERS.available(config.kind, Site(device.type, engine=engine)).build(groups, config, device)


def _adamw(groups: Groups, config: OptimizerConfig, device: torch.device) -> torch.optim.Optimizer:
    """Build AdamW: where torch has the fused kernel, one pass over the state instead of ten, and no copy of the second
    moments' roots (docs/performance.md)."""
    one_pass = device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=one_pass, foreach=not one_pass)


def _cpu_adam(groups: Groups, config: OptimizerConfig, device: torch.device) -> torch.optim.Optimizer:
    """DeepSpeed's vectorised Adam for state in host memory; compiled at its first use (g++, about a minute)."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(groups, lr=config.lr, betas=config.betas, adamw_mode=True)  # type: ignore[no-any-return]


def _fused_adam(groups: Groups, config: OptimizerConfig, device: torch.device) -> torch.optim.Optimizer:
    try:
        from apex.optimizers import FusedAdam
    except ImportError as error:
        raise BackendError(
            f"optimizer.kind=fused_adam: apex cannot be imported ({error}); build it again for this torch (see "
            "environment.yml), or set optimizer.kind=adamw"
        ) from error
    optimizer: torch.optim.Optimizer = _counting_per_parameter(FusedAdam)(
        groups, lr=config.lr, betas=config.betas, adam_w_mode=True
    )
    return optimizer


def _counting_per_parameter(fused_adam: Any) -> Any:
    """apex's FusedAdam with the interface of torch's optimizers.

    apex counts updates once a group, in the group, from its first `step` on. ZeRO-3 calls `step` once a sub-group, and
    a resumed run has made updates before: both would get the bias correction of another update. Here each parameter's
    state has its own count, as torch's has. apex' `zero_grad` takes no argument either (apex/optimizers/fused_adam.py).
    """

    class FusedAdam(fused_adam):  # type: ignore[misc]
        def zero_grad(self, set_to_none: bool = True) -> None:
            torch.optim.Optimizer.zero_grad(self, set_to_none)

        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                counts = {self.state[p].get("step", 0) for p in group["params"] if p.grad is not None}
                assert len(counts) <= 1, "engines update all parameters of a call equally often"
                group["step"] = counts.pop() if counts else 0
            loss = super().step(closure)
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        self.state[p]["step"] = group["step"]
            return loss

    return FusedAdam


@dataclass(frozen=True)
class OptimizerEntry(Entry[Maker]):
    """An optimizer: `state` names its tensors of every parameter, as
    they stand in `optimizer.state`. It counts its updates in `step`, in a tensor on the device or in Python."""

    counts_on_device: bool = False


OPTIMIZERS = Registry(
    "optimizer.kind",
    {
        "adamw": OptimizerEntry(_adamw, state=MOMENTS, counts_on_device=True),
        "cpu_adam": OptimizerEntry(_cpu_adam, MOMENTS),
        "fused_adam": OptimizerEntry(_fused_adam, MOMENTS),
    },
)


def fresh_state(config: OptimizerConfig, param: Tensor) -> dict[str, Any]:
    """The optimizer's state of a parameter before its first step, made early so that a checkpoint can be restored into
    it."""
    entry = OPTIMIZERS[config.kind]
    moments: dict[str, Any] = {moment: torch.zeros_like(param, requires_grad=False) for moment in entry.state}
    return moments | {"step": torch.zeros((), device=param.device) if entry.counts_on_device else 0}


def set_num_updates(optimizer: torch.optim.Optimizer, num_updates: int) -> None:
    """Set the number of updates that the optimizer has made (its bias correction depends on it)."""
    for slot in optimizer.state.values():
        if "step" in slot:
            count = slot["step"]
            slot["step"] = torch.full_like(count, num_updates) if torch.is_tensor(count) else num_updates


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
