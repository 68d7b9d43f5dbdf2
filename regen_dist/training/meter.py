"""What a stretch of steps cost: speed, data wait, MFU, and the means of the losses over micro-batches and ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from regen_dist.distributed.base import StepResult
from regen_dist.distributed.ranks import Ranks
from regen_dist.observe.hardware import memory_bytes


class Meter:
    """Gathers the figures of the steps between two log lines.

    Args:
        clips_per_step: of the global batch.
        flops_per_clip: of one training step (forward and backward), without recomputation.
        peak_tflops: of one rank.
    """

    def __init__(self, ranks: Ranks, clips_per_step: int, flops_per_clip: float, peak_tflops: float) -> None:
        self._ranks, self._clips = ranks, clips_per_step
        self._flops, self._peak = flops_per_clip * clips_per_step, peak_tflops * 1e12 * ranks.world_size
        self._sums: dict[str, Tensor | float] = {}
        self._reset()

    def _reset(self) -> None:
        self._began, self._steps, self._waited = time.perf_counter(), 0, 0.0
        self._sums = {}
        self._micro = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time in the block is data wait."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def add(self, loss: Tensor, figures: Mapping[str, Tensor]) -> None:
        """The loss and the figures of a micro-batch. Kept on the device: no synchronisation."""
        for name, value in {"loss": loss.detach(), **figures}.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.double()
        self._micro += 1

    def end_step(self) -> None:
        self._steps += 1

    def read(self, lr: float, result: StepResult) -> dict[str, float]:
        """The figures since the last reading, averaged over ranks. A collective."""
        names = list(self._sums)
        totals = self._ranks.sum([float(torch.as_tensor(self._sums[name])) for name in names])
        means = {
            name: total / (self._micro * self._ranks.world_size) for name, total in zip(names, totals, strict=True)
        }
        elapsed = time.perf_counter() - self._began
        figures = {
            **means,
            "grad_norm": result.grad_norm,
            "lr": lr,
            "step_s": elapsed / self._steps,
            "clips_per_s": self._clips * self._steps / elapsed,
            "mfu": self._flops * self._steps / elapsed / self._peak,
            "data_wait": self._waited / elapsed,
            "memory_bytes": memory_bytes(self._ranks.device),
        }
        self._reset()
        return figures

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in the block does not count: validation and saving are not training."""
        start = time.perf_counter()
        yield
        self._began += time.perf_counter() - start
