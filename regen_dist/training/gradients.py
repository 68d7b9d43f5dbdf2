"""Norms of the gradients by layer: a hook of the training step (`train.grad_norms_every`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from regen_dist.distributed.ranks import Ranks


class GradientNorms:
    """Reports the norm of every layer's gradient, before clipping: their squares add up to that of `grad_norm`.

    Args:
        every: steps from one report to the next.
        ranks: of the job; each holds a piece of every gradient.
        report: told of the step and the norm of each layer.
    """

    def __init__(self, every: int, ranks: Ranks, report: Callable[[int, Mapping[str, float]], None]) -> None:
        self._every, self._ranks, self._report = every, ranks, report

    def __call__(self, step: int, gradients: Iterable[tuple[str, Tensor]]) -> None:
        """See a step's gradients (`step.GradientHook`). A collective."""
        if step % self._every:
            return
        squares: dict[str, list[Tensor]] = {}
        for name, piece in gradients:
            squares.setdefault(layer_of(name), []).append(torch.linalg.vector_norm(piece, dtype=torch.float64).square())
        own = torch.stack([torch.stack(each).sum() for each in squares.values()]).tolist()  # one wait for the device
        totals = self._ranks.sum(own)
        self._report(step, {layer: math.sqrt(total) for layer, total in zip(squares, totals, strict=True)})


def layer_of(parameter: str) -> str:
    """The layer that a parameter belongs to: its name up to the first number (`decoder.blocks.3`), or, where there is
    none, up to the parameter's own name (`decoder.unpatch`)."""
    parts = parameter.split(".")
    numbered = next((place for place, part in enumerate(parts) if part.isdigit()), None)
    return ".".join(parts[:-1] if numbered is None else parts[: numbered + 1]) or parameter
