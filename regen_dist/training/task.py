"""Interface of a training task: all that differs between training the embedder, its baseline, and text to video.

The loop is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.nn as nn
from torch import Tensor

from regen_dist.data.loading.plan import BadSample
from regen_dist.distributed.engine import Engine
from regen_dist.distributed.ranks import Ranks

AnyBatch = TypeVar("AnyBatch", bound=NamedTuple)


def on_device(batch: AnyBatch, device: torch.device) -> AnyBatch:
    """Return a batch with its tensors on a device. From page-locked memory the copies do not wait for the GPU."""
    moved = {
        name: value.to(device, non_blocking=True)
        for name, value in batch._asdict().items()
        if isinstance(value, Tensor)
    }
    return batch._replace(**moved)


class Loss(NamedTuple):
    """The loss of a micro-batch (a scalar that carries gradients) and figures to log (plain numbers, averaged over
    micro-batches and ranks). `extra` are further terms of what is minimised (train.losses): `value` stays what is
    logged, compared with other runs, and judged by the spike guard."""

    value: Tensor
    figures: dict[str, Tensor]
    extra: Tensor | None = None

    @property
    def total(self) -> Tensor:
        """The quantity to minimise."""
        return self.value if self.extra is None else self.value + self.extra


class Validation(NamedTuple):
    """Figures of fixed samples, and media: source videos beside their reconstructions, [B, 3, T, H, W] in [-1, 1] (None
    if nothing was decoded). `captions` are those of generated videos, at `fps`."""

    figures: dict[str, float]
    source: Tensor | None = None
    made: Tensor | None = None
    title: str = ""
    label: str = ""
    captions: tuple[str, ...] = ()
    fps: float = 24.0


class Batch(Protocol):
    """Part of a micro-batch's interface that the loop needs."""

    @property
    def sample_ids(self) -> Tensor:
        """int64 [b]."""

    @property
    def bad(self) -> tuple[BadSample, ...]:
        """Samples that were found to be bad."""

    @property
    def num_replaced(self) -> int:
        """Number of replacement samples."""

    @property
    def problem(self) -> str | None:
        """Message on a problem with reading, to be reported once; None if there is none."""

    @property
    def kind(self) -> str:
        """Shape of the batch in words: losses of different kinds differ."""


class BatchSource(Protocol):
    """Part of the training data's interface that the loop needs."""

    def identity(self) -> dict[str, str]:
        """Everything that decides which samples a step sees."""

    def summary(self) -> str:
        """One line for the log."""


class TrainingTask(Protocol):
    """Part of a task's interface that the loop needs."""

    @property
    def data(self) -> BatchSource:
        """The training data, opened at the first use."""

    def build(self, ranks: Ranks = Ranks(), *, resumes: bool = False) -> nn.Module:  # noqa: B008 - frozen
        """Build a fresh model, the same on every rank. A collective of `ranks` if the start depends on the data; it
        does not if the run `resumes`, because then a checkpoint sets every weight."""

    def batches(self, ranks: Ranks, cursor: int) -> Generator[Any]:
        """This rank's micro-batches (`Batch`) from a cursor on (samples consumed so far by all ranks). Ranks that share
        samples count as one of `ranks`."""

    def loss(self, engine: Engine, batch: Any, step: int) -> Loss:
        """The mean loss of a micro-batch. Randomness is a function of (seed, step, sample id)."""

    def flops(self, batch: Any) -> float:
        """Operations that training on a micro-batch needs."""

    def read_validation(self, ranks: Ranks) -> None:
        """Read all that `validate` needs, so that what is wrong with it ends the run before its first step. A
        collective."""

    def validate(self, engine: Engine, meet: Callable[[], None] = lambda: None) -> Validation:
        """Evaluate fixed samples. A collective under ZeRO-3: every rank computes the same.

        Args:
            engine: the model.
            meet: waits for the other ranks and shows the hang detector that the validation goes on. Called on all ranks
                alike after each long part of rank 0's work.
        """
