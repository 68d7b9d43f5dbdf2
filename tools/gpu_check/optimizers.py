"""Optimizers with their own kernels against torch's plain AdamW: 20 steps, save, resume, 20 more."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from regen_dist.config.run import OptimizerConfig
from regen_dist.distributed.optimizer import MOMENTS, build_optimizer, fresh_state, set_num_updates
from regen_dist.errors import BackendError
from tools.gpu_check.machine import Machine, relative_error, require_close

_STEPS = 20  # before it is saved, and after
_TOLERANCE = 1e-4  # of float32, after 40 updates
# 1 - rate * decay is a float32: rounded, it alone would make kernels that multiply by it differ by nearly the tolerance
# from those that subtract.
_LR, _DECAY = 2**-10, 2**-3


def optimizers(machine: Machine) -> dict[str, Any]:
    """Compare the weights' way of every kind that runs here with plain AdamW's."""
    shapes = machine.size([(3072, 3072), (3072,), (1,), (7, 13, 3)], [(64, 64), (64,), (1,), (7, 13, 3)])
    errors, missing = {}, {}
    for kind in ("adamw", "fused_adam"):
        config = OptimizerConfig.model_validate({"kind": kind, "lr": _LR, "weight_decay": _DECAY})
        try:
            errors[kind] = _compare(machine, config, shapes)
        except BackendError as error:
            missing[kind] = str(error).partition(";")[0]
    worst = max(errors.values())
    return {
        "errors": errors,
        "not_run": missing,
        "summary": f"{', '.join(errors)}: relative error of {2 * _STEPS} updates at most {worst:.1e}"
        + "".join(f"; {kind} not run" for kind in missing),
    }


def _compare(machine: Machine, config: OptimizerConfig, shapes: list[tuple[int, ...]]) -> float:
    """Return the relative error of the sum of all updates."""
    start = list(_random(machine, shapes, 0))
    expected = _plain(config, machine, start, shapes)
    weights = [each.clone() for each in start]
    with TemporaryDirectory() as folder:
        saved = Path(folder) / "state.safetensors"
        _save(_advance(config, machine, weights, shapes, 0), weights, saved)
        resumed = [torch.zeros_like(each) for each in weights]
        _advance(config, machine, resumed, shapes, _STEPS, saved)
    pairs = zip(resumed, expected, start, strict=True)
    return max(require_close(config.kind, relative_error(a - s, b - s), _TOLERANCE) for a, b, s in pairs)


def _plain(
    config: OptimizerConfig, machine: Machine, start: list[Tensor], shapes: list[tuple[int, ...]]
) -> list[Tensor]:
    """Return the result of torch's single-tensor loop, uninterrupted."""
    weights = [each.clone() for each in start]
    groups = [
        {"params": [each for each in weights if each.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [each for each in weights if each.ndim <= 1], "weight_decay": 0.0},
    ]
    plain = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=False, foreach=False)
    for step in range(2 * _STEPS):
        _update(plain, weights, machine, shapes, step)
    return weights


def _advance(
    config: OptimizerConfig,
    machine: Machine,
    weights: list[Tensor],
    shapes: list[tuple[int, ...]],
    first: int,
    saved: Path | None = None,
) -> torch.optim.Optimizer:
    """Apply `_STEPS` updates from step `first` on, as an engine does."""
    optimizer = build_optimizer(config, weights, machine.device)
    for weight in weights:
        optimizer.state[weight] = fresh_state(config, weight)
    if saved is not None:
        _restore(optimizer, weights, saved)
        set_num_updates(optimizer, first)
    for step in range(first, first + _STEPS):
        _update(optimizer, weights, machine, shapes, step)
    return optimizer


def _update(
    optimizer: torch.optim.Optimizer, weights: list[Tensor], machine: Machine, shapes: list[tuple[int, ...]], step: int
) -> None:
    for weight, gradient in zip(weights, _random(machine, shapes, 1 + step), strict=True):
        weight.grad = gradient
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _save(optimizer: torch.optim.Optimizer, weights: list[Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    state = {f"weight/{index}": weight for index, weight in enumerate(weights)}
    for index, weight in enumerate(weights):
        state |= {f"{moment}/{index}": optimizer.state[weight][moment] for moment in MOMENTS}
    save_file({name: each.detach().cpu().contiguous() for name, each in state.items()}, path)


def _restore(optimizer: torch.optim.Optimizer, weights: list[Tensor], path: Path) -> None:
    from safetensors.torch import load_file

    state = load_file(path)
    for index, weight in enumerate(weights):
        weight.copy_(state[f"weight/{index}"])
        for moment in MOMENTS:
            optimizer.state[weight][moment].copy_(state[f"{moment}/{index}"])


def _random(machine: Machine, shapes: list[tuple[int, ...]], seed: int) -> Iterator[Tensor]:
    generator = torch.Generator(machine.device).manual_seed(seed)
    return (torch.randn(shape, device=machine.device, generator=generator) for shape in shapes)
