"""What a step computes, and on what: all that differs between training the embedder, its baseline, and text to video.
The loop is the same.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, NamedTuple, Protocol

import torch.nn as nn
from torch import Tensor

from regen_dist.data.loading.plan import BadSample
from regen_dist.distributed.engine import Engine
from regen_dist.distributed.ranks import Ranks


class Loss(NamedTuple):
    """The loss of a micro-batch (a scalar that carries gradients) and figures to log (plain numbers, averaged over
    micro-batches and ranks). `extra` are further terms of what is minimised (train.losses): `value` stays what is
    logged, compared with other runs, and judged by the spike guard."""

    value: Tensor
    figures: dict[str, Tensor]
    extra: Tensor | None = None

    @property
    def total(self) -> Tensor:
        """All that is minimised."""
        return self.value if self.extra is None else self.value + self.extra


class Validation(NamedTuple):
    """Figures of fixed samples, and what to look at: source videos beside what the model makes of them, [B, 3, T, H, W]
    in [-1, 1] (None where nothing was decoded). `captions` are those of videos that were generated, at `fps`."""

    figures: dict[str, float]
    source: Tensor | None = None
    made: Tensor | None = None
    title: str = ""
    label: str = ""
    captions: tuple[str, ...] = ()
    fps: float = 24.0


class Batch(Protocol):
    """What the loop needs of a micro-batch."""

    @property
    def sample_ids(self) -> Tensor:
        """int64 [b]."""

    @property
    def bad(self) -> tuple[BadSample, ...]:
        """Samples that were found to be bad."""

    @property
    def num_replaced(self) -> int:
        """How many samples come from others in place of bad ones."""

    @property
    def problem(self) -> str | None:
        """What else should be known (once) of the reading."""

    @property
    def kind(self) -> str:
        """Its shape in words: losses of different kinds differ."""


class BatchSource(Protocol):
    """What the loop needs of the training data."""

    def identity(self) -> dict[str, str]:
        """Everything that decides which samples a step sees."""

    def summary(self) -> str:
        """One line for the log."""


class TrainingTask(Protocol):
    """What the loop needs of a task."""

    @property
    def data(self) -> BatchSource:
        """The training data, opened at the first use."""

    def build(self, ranks: Ranks = Ranks(), *, resumes: bool = False) -> nn.Module:  # noqa: B008 - frozen
        """A fresh model, the same on every rank. A collective of `ranks` where the data decide how it begins, which
        they need not if it `resumes`: then a checkpoint sets every weight."""

    def batches(self, ranks: Ranks, cursor: int) -> Generator[Any]:
        """This rank's micro-batches (`Batch`) from a cursor on (samples consumed so far by all ranks). Ranks that share
        samples count as one of `ranks`."""

    def loss(self, engine: Engine, batch: Any, step: int) -> Loss:
        """The mean loss of a micro-batch. Randomness is a function of (seed, step, sample id)."""

    def flops(self, batch: Any) -> float:
        """Operations that training on a micro-batch needs."""

    def validate(self, engine: Engine) -> Validation:
        """Look at fixed samples. A collective under ZeRO-3: every rank computes the same."""
