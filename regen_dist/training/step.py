"""The training step: fetch, loss, backward, clip, rate, optimizer, EMA. The loop of a run and every bench of steps make
it here."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from regen_dist.config import AnyRunConfig
from regen_dist.distributed.engine import Engine, StepResult
from regen_dist.distributed.ranks import Ranks
from regen_dist.training.guards import poison_nonfinite
from regen_dist.training.metrics import RankClock, StepMeter, learning_rate
from regen_dist.training.task import Batch, TrainingTask

_IN_A_STEP = ("data", "forward and backward", "update")

GradientHook = Callable[[int, Iterable[tuple[str, Tensor]]], None]
"""Sees the gradients of a step (counted from 1) before they are clipped, used and cleared: the name of every parameter,
and this rank's flat float32 piece of its gradient, averaged over micro-batches and ranks (`Engine.named_gradients`).
Called on every rank, so that it may be a collective."""


class Step(NamedTuple):
    """A completed step: its learning rate, its result, and its last micro-batch."""

    lr: float
    result: StepResult
    batch: Batch


class Stepper:
    """One rank's steps, with all that they need and nothing that surrounds them: a bench uses this, a run `Trainer`.

    Args:
        config: config of the run.
        ranks: this process's place.
        task: gives batches and losses.
        engine: holds model and optimizer.
        meter: counts and times.
        step: steps that were made before.
        data_shift: batches of the order that were left out before.
        batches: this rank's micro-batches from there on; opened by default.
        mark: called with this rank's next phase and its step, for the heartbeat.
        gradient_hooks: see the gradients of every step.

    Attributes:
        batches: this rank's micro-batches from the current step on; another source of them may take their place.
    """

    def __init__(
        self,
        config: AnyRunConfig,
        ranks: Ranks,
        task: TrainingTask,
        engine: Engine,
        meter: StepMeter,
        *,
        step: int = 0,
        data_shift: int = 0,
        batches: Iterator[Batch] | None = None,
        mark: Callable[[str, int], None] = lambda phase, step: None,
        gradient_hooks: Sequence[GradientHook] = (),
    ) -> None:
        self.config, self.ranks, self.task, self.engine, self.meter = config, ranks, task, engine, meter
        self.step, self.data_shift = step, data_shift
        self.clock = RankClock(ranks)
        self.gradient_hooks, self._tell = list(gradient_hooks), mark
        self.batches: Iterator[Batch] = self.open_batches() if batches is None else batches

    def train_step(self) -> Step:
        """Make one optimizer step."""
        train, leads = self.config.train, self.engine.rows.leads  # shared samples are counted once
        for micro in range(train.accumulation):
            # Fetch a micro-batch.
            self._mark("data")
            with self.meter.waiting(), self.clock.waiting(), record_function("batches"):
                batch = next(self.batches)
            # Loss and backward: gradients add up over the micro-batches; the last one averages them over the ranks.
            self._mark("forward and backward")
            loss = self.task.loss(self.engine, batch, self.step)
            self.engine.backward(poison_nonfinite(loss.total), is_last=micro + 1 == train.accumulation)
            # Count it, without waiting for the device.
            flops, bad_samples = self.task.flops(batch) * leads, batch.num_replaced * leads
            self.meter.add(loss.value, loss.figures, flops, bad_samples=bad_samples)
            if leads:
                self._fetched(micro, batch)
        self._mark("update")
        # Gradients are complete and not cleared yet: hooks inspect them here.
        for look in self.gradient_hooks:
            look(self.step + 1, self.engine.named_gradients())
        # Clip, rate, optimizer, EMA: by the engine, because ZeRO-3 does the first three and the clearing in one.
        lr = learning_rate(self.config.optimizer, self.step, train.steps)
        with record_function("update"):
            result = self.engine.step(lr)
        self.step += 1
        return Step(lr, result, batch)

    def open_batches(self) -> Generator[Batch]:
        """Open this rank's micro-batches from the current step on; the position in the data is the step plus the
        batches left out."""
        rows, cursor = self.engine.rows, (self.step + self.data_shift) * self.config.train.batch_global
        return rows.read(lambda: self.task.batches(rows.readers, cursor))

    def close_batches(self) -> None:
        """End the data workers."""
        if isinstance(self.batches, Generator):
            self.batches.close()

    def _fetched(self, micro: int, batch: Batch) -> None:
        """Note a micro-batch of the current step."""

    def _mark(self, phase: str) -> None:
        """Mark the phase with its step as the record counts steps, from 1: the current step, or the one just made."""
        self._tell(phase, self.step + (phase in _IN_A_STEP))


# Norms of the gradients by layer: a hook of the training step (`train.grad_norms_every`).


class GradientNorms:
    """Reports the norm of every layer's gradient, before clipping: their squares add up to that of `grad_norm`.

    Args:
        every: steps from one report to the next.
        ranks: ranks of the job; each holds a piece of every gradient.
        report: called with the step and the norm of each layer.
    """

    def __init__(self, every: int, ranks: Ranks, report: Callable[[int, Mapping[str, float]], None]) -> None:
        self._every, self._ranks, self._report = every, ranks, report

    def __call__(self, step: int, gradients: Iterable[tuple[str, Tensor]]) -> None:
        """Inspect a step's gradients (a `GradientHook`). A collective."""
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
    none, up to the parameter's own name (`decoder.head`)."""
    parts = parameter.split(".")
    numbered = next((place for place, part in enumerate(parts) if part.isdigit()), None)
    return ".".join(parts[:-1] if numbered is None else parts[: numbered + 1]) or parameter
