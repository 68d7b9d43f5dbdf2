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
        peak_tflops: of one rank.
    """

    def __init__(self, ranks: Ranks, clips_per_step: int, peak_tflops: float) -> None:
        self._ranks, self._clips = ranks, clips_per_step
        self._peak = peak_tflops * 1e12 * ranks.world_size
        self._sums: dict[str, Tensor | float] = {}
        self.reset()

    def reset(self) -> None:
        """Begin anew: nothing was counted, and the clock starts."""
        self._began, self._steps, self._waited = time.perf_counter(), 0, 0.0
        self._cpu_began = time.process_time()
        self._sums = {}
        self._counts: dict[str, int] = {}  # batches of one step have the same figures on all ranks, steps may differ
        self._flops, self._bad_samples = 0.0, 0
        self._step_losses: list[Tensor] = []
        self._step_bad = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time in the block is data wait."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def add(self, loss: Tensor, figures: Mapping[str, Tensor], flops: float, bad_samples: int = 0) -> None:
        """The loss and the figures of a micro-batch of this rank. Kept on the device: no synchronisation.

        Args:
            flops: operations that training on it needs (forward and backward), without recomputation.
            bad_samples: how many of its clips are stand-ins.
        """
        for name, value in {"loss": loss.detach(), **figures}.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.double()
            self._counts[name] = self._counts.get(name, 0) + 1
        self._flops += flops
        self._step_losses.append(loss.detach().double())
        self._step_bad += bad_samples

    def end_step(self) -> tuple[float, int]:
        """Close a step. Returns this rank's mean loss of it, and how many of its clips were stand-ins."""
        loss, bad = float(torch.stack(self._step_losses).mean()), self._step_bad
        self._step_losses, self._step_bad = [], 0
        self._steps, self._bad_samples = self._steps + 1, self._bad_samples + bad
        return loss, bad

    def read(self, lr: float, result: StepResult) -> dict[str, float]:
        """The figures since the last reading, averaged over ranks. A collective."""
        names = list(self._sums)
        values = [float(torch.as_tensor(self._sums[name])) for name in names]
        *totals, bad_samples, flops = self._ranks.sum([*values, float(self._bad_samples), self._flops])
        means = {
            name: total / (self._counts[name] * self._ranks.world_size)
            for name, total in zip(names, totals, strict=True)
        }
        elapsed = time.perf_counter() - self._began
        figures = {
            **means,
            "grad_norm": result.grad_norm,
            "lr": lr,
            "step_s": elapsed / self._steps,
            "cpu_step_s": (time.process_time() - self._cpu_began) / self._steps,  # of rank 0, all its threads
            "clips_per_s": self._clips * self._steps / elapsed,
            "mfu": flops / elapsed / self._peak,
            "data_wait": self._waited / elapsed,
            "memory_bytes": memory_bytes(self._ranks.device),
            "bad_samples": bad_samples,
            "clips": self._clips * self._steps,
        }
        self.reset()
        return figures

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in the block does not count: validation and saving are not training."""
        start, cpu_start = time.perf_counter(), time.process_time()
        yield
        self._began += time.perf_counter() - start
        self._cpu_began += time.process_time() - cpu_start
